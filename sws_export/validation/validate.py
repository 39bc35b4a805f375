"""Run a graph in ONNX Runtime, run its reference, and compare the outputs."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from sws_export.checkpoint import Checkpoint, FusedWeights
from sws_export.checkpoint.unet_io import size_multiple
from sws_export.errors import ValidationError
from sws_export.manifest import PREDICTION
from sws_export.onnx_files import declared_sizes, load_onnx
from sws_export.progress import Progress
from sws_export.tensors import Precision, TensorSpec
from sws_export.validation.compare import OutputDifference, compare_outputs, max_over_steps
from sws_export.validation.onnx_runner import OnnxRunner
from sws_export.validation.reference_runner import ReferenceRunner
from sws_export.validation.sizes import FLOAT64_PARAMETERS, validation_sizes
from sws_export.validation.sws_spec import SwsSpec
from sws_export.validation.tolerances import output_tolerances, quantized_tolerance
from sws_export.validation.trajectory import Array, Trajectory

STEPS = 5

_BYPASS_TOLERANCE: dict[Precision, float] = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-5}

Outputs = dict[str, Array]


class PlainInputs(Protocol):
    """How a plain graph is run that has other inputs than the SWS graph made from it."""

    def comparable(self, inputs: Mapping[str, Array]) -> Outputs:
        """Inputs of the SWS graph that the plain graph can have, too."""

    def inputs(self, inputs: Mapping[str, Array]) -> Outputs:
        """`comparable` inputs as inputs of the plain graph."""

    def outputs(self, outputs: Mapping[str, Array]) -> Outputs:
        """Outputs of the plain graph under the names of the SWS graph."""


@dataclasses.dataclass(frozen=True)
class ValidationReport:
    """Result of a validation.

    Attributes:
        reference: What the graph was compared with, in words.
        remarks: Limitations of the comparison.
        steps: Number of steps with the state fed back.
        sizes: batch, height, width (of the latent) and tokens.
        outputs: One entry for each output, states included.
        seconds: Wall time.
        unquantized: The difference of the prediction of the same graph without 8-bit weights, if it was run.
    """

    reference: str
    remarks: tuple[str, ...]
    steps: int
    sizes: Mapping[str, int]
    outputs: tuple[OutputDifference, ...]
    seconds: float
    unquantized: OutputDifference | None = None

    @property
    def passed(self) -> bool:
        """Whether every output is within its tolerance."""
        return all(output.passed for output in self.outputs)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        found: dict[str, Any] = {
            "passed": self.passed,
            "reference": self.reference,
            "remarks": list(self.remarks),
            "steps": self.steps,
            "sizes": dict(self.sizes),
            "outputs": [dataclasses.asdict(output) | {"passed": output.passed} for output in self.outputs],
            "seconds": round(self.seconds, 2),
        }
        if self.unquantized is not None:
            found["unquantized"] = dataclasses.asdict(self.unquantized) | {"passed": self.unquantized.passed}
        return found


def validate_against_reference(
    onnx_path: Path,
    checkpoint: Checkpoint,
    inputs: Sequence[TensorSpec],
    sws_spec: SwsSpec,
    precision: Precision,
    progress: Progress,
    fused: FusedWeights | None = None,
    unquantized: ir.Model | None = None,
) -> ValidationReport:
    """Compare an SWS graph with the eager reference over a sampling run.

    Args:
        onnx_path: The exported graph.
        checkpoint: The checkpoint that the graph was exported from.
        inputs: Inputs of the UNet.
        sws_spec: The SWS configuration of the graph.
        precision: Precision of the export.
        progress: Receives the stage.
        fused: Weights that replace those of the checkpoint, such as weights with fused LoRAs.
        unquantized: The same graph without 8-bit weights, whose error is reported, too.

    Raises:
        ValidationError: An output of the reference is not finite.
    """
    start = time.monotonic()
    parameter_count = checkpoint.parameter_count
    float64 = parameter_count <= FLOAT64_PARAMETERS
    sizes = validation_sizes(size_multiple(checkpoint.config), parameter_count) | declared_sizes(
        load_onnx(onnx_path)
    )
    trajectory = Trajectory(inputs, sizes, STEPS)
    graph_inputs: list[Outputs] = []
    expected: list[Outputs] = []
    with progress.stage("validate", total=(3 if unquantized else 2) * STEPS) as stage:
        stage.describe("loading the reference")
        reference = ReferenceRunner(checkpoint, fused, sws_spec, trajectory.intensity, float64=float64)
        for step in trajectory.steps():
            stage.describe("running the reference")
            step_inputs = trajectory.inputs(step)
            graph_inputs.append(step_inputs | {"sigma": step.sigma, "intensity": trajectory.intensity})
            expected.append(reference.step(step_inputs, step.sigma))
            _require_finite(expected[-1])
            trajectory.advance(step, expected[-1]["out_sample"].astype(np.float64))
            stage.advance()
        stage.describe("loading ONNX Runtime")
        runner = OnnxRunner(onnx_path)
        stage.describe("running ONNX Runtime")
        actual = runner.run(graph_inputs, stage)
        without = None
        if unquantized is not None:
            stage.describe("running the unquantized graph")
            without = OnnxRunner(unquantized).run(graph_inputs, stage)
    tolerances = output_tolerances(expected, sws_spec, precision)
    remarks = []
    if precision == "bf16":
        remarks.append("ONNX Runtime has no bfloat16: a float32 copy of the graph was compared")
    guard = sws_spec.guard
    if guard.kl_only:
        remarks.append(f"the KL divergence is that of {guard.rows} of the query rows, in the reference too")
    elif guard.rows < 1:
        remarks.append(f"the guard evaluates {guard.rows} of the query rows, the reference all of them")
    return ValidationReport(
        reference=f"eager reference in {'float64' if float64 else 'float32'}",
        remarks=tuple(remarks),
        steps=STEPS,
        sizes=sizes,
        outputs=_compare(actual, expected, tolerances),
        seconds=time.monotonic() - start,
        unquantized=_compare_unquantized(without, expected, sws_spec, precision),
    )


def _compare_unquantized(
    actual: Sequence[Outputs] | None,
    expected: Sequence[Outputs],
    sws_spec: SwsSpec,
    precision: Precision,
) -> OutputDifference | None:
    """The difference of the prediction without 8-bit weights."""
    if actual is None:
        return None
    tolerances = output_tolerances(
        expected, dataclasses.replace(sws_spec, weights=None, activations=None), precision
    )
    (prediction,) = _compare(actual, expected, {PREDICTION: tolerances[PREDICTION]})
    return prediction


def _require_finite(outputs: Outputs) -> None:
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise ValidationError(
                f"{name} of the eager reference contains NaN or Inf, so nothing can be compared with it: "
                "the checkpoint is damaged; use another copy, or skip validation with --no-validate"
            )


def _compare(
    actual: Sequence[Outputs], expected: Sequence[Outputs], tolerances: dict[str, float]
) -> tuple[OutputDifference, ...]:
    """Compare the outputs that have a tolerance, over all steps."""
    return max_over_steps(
        [
            compare_outputs(
                step_actual,
                {name: values for name, values in step_expected.items() if name in tolerances},
                tolerances,
            )
            for step_actual, step_expected in zip(actual, expected, strict=True)
        ]
    )


def validate_against_plain(
    onnx_path: Path,
    plain_path: Path,
    inputs: Sequence[TensorSpec],
    sizes: Mapping[str, int],
    sws_spec: SwsSpec,
    precision: Precision,
    progress: Progress,
    original: PlainInputs | None = None,
    unquantized: ir.Model | None = None,
) -> ValidationReport:
    """Compare an SWS graph at intensity 0 with the plain graph that it was made from.

    Used if the checkpoint is not available. It shows that the rewrite preserves the UNet; the computation of
    SWS itself is not compared.

    Args:
        onnx_path: The exported graph.
        plain_path: The plain graph.
        inputs: Inputs of the plain graph.
        sizes: batch, height, width (of the latent) and tokens to run with.
        sws_spec: The SWS configuration of the graph.
        precision: Precision of the export.
        progress: Receives the stage.
        original: How the plain graph is run, if its inputs differ from those of the SWS graph.
        unquantized: The same graph without 8-bit weights, whose error is reported, too.

    Raises:
        ValidationError: With this preset, the SWS graph equals the plain one at no intensity and noise level.
    """
    bypass = {PREDICTION: _BYPASS_TOLERANCE[precision]}
    tolerances = bypass
    if unquantized is not None:
        tolerances = {PREDICTION: quantized_tolerance(sws_spec)}
    bypass_sigma = sws_spec.preset.bypass_sigma(sws_spec.parameters)
    if sws_spec.sites and bypass_sigma is None and not sws_spec.preset.plain_at_zero:
        raise ValidationError(
            f"with --preset {sws_spec.preset.name} --u {sws_spec.preset.u} a graph never equals the plain "
            "one, so one made from another graph cannot be validated; nothing was written. Export the "
            "checkpoint, or use --u sigma or --no-validate"
        )
    start = time.monotonic()
    trajectory = Trajectory(inputs, sizes, STEPS)
    intensity = np.zeros(sizes["batch"])
    graph_inputs: list[Outputs] = []
    expected: list[Outputs] = []
    with progress.stage("validate", total=(3 if unquantized else 2) * STEPS) as stage:
        stage.describe("loading ONNX Runtime")
        plain, graph = OnnxRunner(plain_path), OnnxRunner(onnx_path)
        stage.describe("running the plain graph")
        for step in trajectory.steps():
            step_inputs = trajectory.inputs(step)
            plain_inputs = step_inputs
            if original is not None:
                step_inputs = original.comparable(step_inputs)
                plain_inputs = original.inputs(step_inputs)
            sigma = step.sigma if bypass_sigma is None else np.full_like(step.sigma, bypass_sigma)
            graph_inputs.append(step_inputs | {"sigma": sigma, "intensity": intensity})
            (outputs,) = plain.run([plain_inputs], stage)
            expected.append(original.outputs(outputs) if original is not None else outputs)
            trajectory.advance(step, expected[-1]["out_sample"].astype(np.float64))
        stage.describe("running the SWS graph")
        actual = graph.run(graph_inputs, stage)
        without = None
        if unquantized is not None:
            stage.describe("running the unquantized graph")
            without = _compare(OnnxRunner(unquantized).run(graph_inputs, stage), expected, bypass)
    at_sigma = "" if bypass_sigma is None else f" and sigma {bypass_sigma:g}"
    return ValidationReport(
        reference=f"plain graph, at intensity 0{at_sigma}",
        remarks=("the computation of SWS was not compared: that needs the checkpoint (sws-export validate)",),
        steps=STEPS,
        sizes=sizes,
        outputs=_compare(actual, expected, tolerances),
        seconds=time.monotonic() - start,
        unquantized=without[0] if without else None,
    )

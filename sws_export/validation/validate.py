"""Run a graph in ONNX Runtime beside its reference and report how far they are apart."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from graph_passes.parameters import SwsParameters
from sws_export.checkpoint import Checkpoint, FusedWeights
from sws_export.checkpoint.unet_io import size_multiple
from sws_export.errors import ValidationError
from sws_export.onnx_files import declared_sizes, load_onnx
from sws_export.parameters import Preset, bypass_level
from sws_export.progress import Progress
from sws_export.tensors import Precision, TensorSpec
from sws_export.validation.compare import OutputDifference, compare_outputs, worst
from sws_export.validation.onnx_runner import OnnxRunner
from sws_export.validation.reference_runner import ReferenceRunner
from sws_export.validation.tolerances import allowed_differences
from sws_export.validation.trajectory import Array, Trajectory

STEPS = 5
# More than a transport reaches from its middle, so that some entries of its state lead off the text.
TOKENS = 19
# The reference runs in float64 up to this many parameters; beyond, float32 keeps it within minutes.
FLOAT64_PARAMETERS = 200_000_000

_BYPASS_TOLERANCE: dict[Precision, float] = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-5}

Outputs = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class SwsSpec:
    """The SWS in a graph.

    Attributes:
        parameters: What it was exported with.
        sites: Attention modules; none for a plain graph.
        guard_rows: Share of the query rows that the key guard sees.
        debug_sites: Columns of the debug outputs; none where there are no such outputs.
        preset: Whose mathematics.
    """

    parameters: SwsParameters
    sites: tuple[str, ...]
    guard_rows: Fraction = Fraction(1)
    debug_sites: tuple[str, ...] = ()
    preset: Preset = "sws"


@dataclasses.dataclass(frozen=True)
class ValidationReport:
    """What a validation compared and what it found.

    Attributes:
        reference: What the graph was compared with, in words.
        remarks: What the comparison does not show.
        steps: Steps with the state fed back.
        sizes: batch, height, width (latent) and tokens.
        outputs: One entry an output, states included.
        seconds: Wall time.
    """

    reference: str
    remarks: tuple[str, ...]
    steps: int
    sizes: Mapping[str, int]
    outputs: tuple[OutputDifference, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every output is within its tolerance."""
        return all(output.passed for output in self.outputs)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {
            "passed": self.passed,
            "reference": self.reference,
            "remarks": list(self.remarks),
            "steps": self.steps,
            "sizes": dict(self.sizes),
            "outputs": [dataclasses.asdict(output) | {"passed": output.passed} for output in self.outputs],
            "seconds": round(self.seconds, 2),
        }


def validation_sizes(config: Mapping[str, Any], parameters: int) -> dict[str, int]:
    """A non-square grid, small enough that a UNet of billions of parameters still answers in minutes."""
    multiple = size_multiple(config)
    rows, columns = (4, 3) if parameters <= FLOAT64_PARAMETERS else (3, 2)
    return {"batch": 2, "height": rows * multiple, "width": columns * multiple, "tokens": TOKENS}


def validate_against_reference(
    onnx_path: Path,
    checkpoint: Checkpoint,
    inputs: Sequence[TensorSpec],
    shuffled: SwsSpec,
    precision: Precision,
    progress: Progress,
    fused: FusedWeights | None = None,
) -> ValidationReport:
    """Compare an SWS graph with the eager reference over a sampling run.

    Args:
        onnx_path: The exported graph.
        checkpoint: The weights that the graph was made from.
        inputs: The UNet's inputs.
        shuffled: The SWS in the graph.
        precision: Precision of the export.
        progress: Receives the stage.
        fused: Weights that take the place of the checkpoint's, such as those with LoRAs.
    """
    start = time.monotonic()
    double = checkpoint.parameter_count <= FLOAT64_PARAMETERS
    sizes = validation_sizes(checkpoint.config, checkpoint.parameter_count) | declared_sizes(
        load_onnx(onnx_path)
    )
    trajectory = Trajectory(inputs, sizes, STEPS)
    expected = []
    with progress.stage("validate", total=2 * STEPS) as stage:
        stage.describe("loading the reference")
        reference = ReferenceRunner(
            checkpoint,
            fused,
            shuffled.parameters,
            shuffled.sites,
            double,
            trajectory.intensity,
            shuffled.debug_sites,
            shuffled.preset,
        )
        fed: list[Outputs] = []
        for step in trajectory.steps():
            stage.describe("running the reference")
            step_inputs = trajectory.inputs(step)
            fed.append(step_inputs | {"sigma": step.sigma, "intensity": trajectory.intensity})
            expected.append(reference.step(step_inputs, step.sigma))
            _require_finite(expected[-1])
            trajectory.advance(step, expected[-1]["out_sample"].astype(np.float64))
            stage.advance()
        stage.describe("loading ONNX Runtime")
        runner = OnnxRunner(onnx_path)
        stage.describe("running ONNX Runtime")
        found = runner.run(fed, stage)
    tolerances = allowed_differences(expected, shuffled.parameters, shuffled.guard_rows, precision)
    remarks = []
    if precision == "bf16":
        remarks.append("ONNX Runtime has no bfloat16: the graph's float32 twin was compared")
    if shuffled.guard_rows < 1:
        remarks.append(f"the guard sees {shuffled.guard_rows} of the query rows, the reference all of them")
    return ValidationReport(
        reference=f"eager reference in {'float64' if double else 'float32'}",
        remarks=tuple(remarks),
        steps=STEPS,
        sizes=sizes,
        outputs=worst([_compare(f, e, tolerances) for f, e in zip(found, expected, strict=True)]),
        seconds=time.monotonic() - start,
    )


def _require_finite(outputs: Outputs) -> None:
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise ValidationError(
                f"{name} of the eager reference itself holds NaN or Inf, so nothing can be compared with it: "
                "the model is broken, use another copy; or skip the comparison with --no-validate"
            )


def _compare(found: Outputs, expected: Outputs, tolerances: dict[str, float]) -> list[OutputDifference]:
    compared = {name: values for name, values in expected.items() if name in tolerances}
    return compare_outputs(found, compared, tolerances)


def validate_against_plain(
    onnx_path: Path,
    plain_path: Path,
    inputs: Sequence[TensorSpec],
    sizes: Mapping[str, int],
    shuffled: SwsSpec,
    precision: Precision,
    progress: Progress,
) -> ValidationReport:
    """Compare an SWS graph at intensity 0 with the plain graph that it was made from.

    For graphs whose checkpoint is not at hand. Shows that the rewrite left the UNet intact; what SWS
    itself computes is not compared.
    """
    level = bypass_level(shuffled.preset, shuffled.parameters)
    start = time.monotonic()
    trajectory = Trajectory(inputs, sizes, STEPS)
    bypass = np.zeros(sizes["batch"])
    fed: list[Outputs] = []
    expected: list[Outputs] = []
    with progress.stage("validate", total=2 * STEPS) as stage:
        stage.describe("loading ONNX Runtime")
        plain, graph = OnnxRunner(plain_path), OnnxRunner(onnx_path)
        stage.describe("running the plain graph")
        for step in trajectory.steps():
            step_inputs = trajectory.inputs(step)
            sigma = step.sigma if level is None else np.full_like(step.sigma, level)
            fed.append(step_inputs | {"sigma": sigma, "intensity": bypass})
            expected += plain.run([step_inputs], stage)
            trajectory.advance(step, expected[-1]["out_sample"].astype(np.float64))
        stage.describe("running the shuffled graph")
        found = graph.run(fed, stage)
    tolerances = {"out_sample": _BYPASS_TOLERANCE[precision]}
    return ValidationReport(
        reference="the plain graph, at intensity 0" + ("" if level is None else f" and sigma {level:g}"),
        remarks=("what SWS computes was not compared: that needs the checkpoint (sws-export validate)",),
        steps=STEPS,
        sizes=sizes,
        outputs=worst([_compare(f, e, tolerances) for f, e in zip(found, expected, strict=True)]),
        seconds=time.monotonic() - start,
    )

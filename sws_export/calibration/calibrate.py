"""Runs a graph over a sampling trajectory and measures the inputs of its layers."""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graph_passes.find_layers import Layer
from graph_passes.quantize_weights import FORMATS
from graph_passes.weight_formats import WeightFormat
from sws_export.calibration.layer_error import LayerError
from sws_export.errors import ExportError
from sws_export.progress import Progress, Stage
from sws_export.tensors import TensorSpec
from sws_export.validation.onnx_runner import OnnxRunner
from sws_export.validation.trajectory import Array, Trajectory

STEPS = 5
MAX_STEPS = 16
"""Recorded steps that are run: two prompts, or some steps of each of many."""
PERCENTILES: Mapping[WeightFormat, float] = {"int8": 99.999, "fp8": 100.0}
"""Percentile of the absolute values of an activation that its scale represents; larger ones are clipped.

For int8 the one with the smallest error of those that Wu et al. 2020 (arXiv 2004.09602) compare, on the
trained example. The range of float8 grows with its values, so nothing is gained by clipping: NVIDIA's recipe,
too, takes the largest value for float8 (`FP8_DEFAULT_CONFIG` in `examples/diffusers/quantization/config.py`
of NVIDIA/TensorRT-Model-Optimizer).
"""
_BINS = 2048


@dataclasses.dataclass(frozen=True)
class CalibrationSteps:
    """The steps that a graph is calibrated over.

    Attributes:
        source: Where their inputs come from, in words.
        count: Number of steps.
        run: Runs them and returns their inputs.
    """

    source: str
    count: int
    run: Callable[[OnnxRunner, Stage], list[Mapping[str, Array]]]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was measured, by the name of the layer.

    Attributes:
        activations: Format of the activations.
        ranges: Largest absolute value of a layer's input that is represented.
        errors: Root mean square error of a layer's output with 8-bit weights and inputs, relative to that of
            the output.
        source: Where the inputs come from, in words.
        steps: Number of steps.
    """

    activations: WeightFormat
    ranges: Mapping[str, float]
    errors: Mapping[str, float]
    source: str
    steps: int


def calibrate(
    model: ir.Model,
    layers: Sequence[Layer],
    activations: WeightFormat,
    steps: CalibrationSteps,
    progress: Progress,
    *,
    percentile: float | None = None,
) -> Calibration:
    """Run a graph twice over the same steps: for the ranges, and for the errors with these ranges.

    Args:
        model: The graph that is exported, without 8-bit weights; it is changed.
        layers: Layers of the plain graph, whose nodes have the same names in `model`.
        activations: Format of the activations.
        steps: The steps.
        progress: Receives the stage.
        percentile: Percentile of the absolute values of an activation that its scale represents; None is that
            of `PERCENTILES`.

    Raises:
        ExportError: ONNX Runtime is not installed, a layer is not in the graph, or its input is not finite.
    """
    inputs_of = _layer_inputs(model, layers)
    collector = _collector(PERCENTILES[activations] if percentile is None else percentile)
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        readers.setdefault(inputs_of[layer.name], []).append(layer)

    def collect(name: str, value: Array) -> None:
        _require_finite(readers[name][0], value, steps.source)
        _quietly(collector.collect, {name: value.astype(np.float32)})

    with progress.stage("calibrate", total=2 * steps.count) as stage:
        stage.describe("loading ONNX Runtime")
        runner = OnnxRunner(model, observed=readers.keys())
        stage.describe("measuring ranges")
        runner.observe = collect
        inputs = steps.run(runner, stage)
        thresholds = _quietly(collector.compute_collection_result)
        largest = {name: float(np.abs(found[:2]).max()) for name, found in thresholds.items()}
        stage.describe("measuring the error of each layer")
        errors = {
            layer.name: LayerError(layer, activations, largest[inputs_of[layer.name]], len(inputs))
            for layer in layers
        }

        def measure(name: str, value: Array) -> None:
            for layer in readers[name]:
                errors[layer.name].add(value)

        runner.reset()
        runner.observe = measure
        runner.run(inputs, stage)
    return Calibration(
        activations,
        {layer.name: largest[inputs_of[layer.name]] for layer in layers},
        {name: error.relative for name, error in errors.items()},
        steps.source,
        len(inputs),
    )


def trajectory_steps(specs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> CalibrationSteps:
    """The steps of the trajectory of validation, with the predictions of the graph itself."""

    def run(runner: OnnxRunner, stage: Stage) -> list[Mapping[str, Array]]:
        trajectory = Trajectory(specs, sizes, STEPS)
        inputs: list[Mapping[str, Array]] = []
        for step in trajectory.steps():
            given = {"sigma": step.sigma, "intensity": trajectory.intensity}
            inputs.append(trajectory.inputs(step) | given)
            (outputs,) = runner.run([inputs[-1]], stage)
            trajectory.advance(step, outputs["out_sample"].astype(np.float64))
        return inputs

    return CalibrationSteps("the trajectory of the validation", STEPS, run)


def recorded_steps(inputs: Sequence[Mapping[str, Array]], source: str) -> CalibrationSteps:
    """At most `MAX_STEPS` of the recorded steps, evenly spaced; `source` names their origin in words."""
    indices = np.unique(np.linspace(0, len(inputs) - 1, MAX_STEPS).round().astype(int))
    chosen = [inputs[index] for index in indices]

    def run(runner: OnnxRunner, stage: Stage) -> list[Mapping[str, Array]]:
        runner.run(chosen, stage)
        return chosen

    return CalibrationSteps(source, len(chosen), run)


def _require_finite(layer: Layer, value: Array, source: str) -> None:
    if not np.isfinite(value).all():
        raise ExportError(
            f"{layer.name}: its input contains NaN or Inf in the calibration over {source}: the checkpoint "
            "is damaged, or an activation exceeds float16; use another copy of the checkpoint, or "
            "--precision bf16 --weights int8, which needs no calibration"
        )


def _layer_inputs(model: ir.Model, layers: Sequence[Layer]) -> dict[str, str]:
    """Names of the values that the layers read, which become outputs of the graph."""
    nodes = {node.name: node for node in model.graph}
    values = {value.name: value for value in model.graph.inputs}
    values |= {value.name: value for node in model.graph for value in node.outputs}
    names = {}
    for layer in layers:
        source, node = layer.node.inputs[0], nodes.get(layer.node.name)
        assert source is not None
        # A projection that was moved behind the transport of its input is a node with another name.
        value = node.inputs[0] if node is not None else values.get(source.name)
        if value is None:
            raise ExportError(f"{layer.name}: the layer is not in the lowered graph, so it is not calibrated")
        names[layer.name] = str(value.name)
        if not value.is_graph_input() and not value.is_graph_output():
            model.graph.outputs.append(value)
    return names


def _collector(percentile: float) -> Any:
    from onnxruntime.quantization.calibrate import HistogramCollector

    return HistogramCollector(
        method="percentile",
        symmetric=True,
        num_bins=_BINS,
        num_quantized_bins=FORMATS["int8"].largest,
        percentile=percentile,
        scenario="same",
    )


def _quietly(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function of ONNX Runtime that prints its progress."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)

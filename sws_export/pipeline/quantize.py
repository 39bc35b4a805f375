"""8 bits in a graph: quantizing a plain graph, and describing the result."""

import collections
from collections.abc import Mapping

import onnx_ir as ir

from graph_passes.find_layers import Layer, find_layers
from graph_passes.insert_qdq import InsertQdq
from graph_passes.quantize_weights import QuantizeWeights
from graph_passes.weight_formats import WeightFormat
from sws_export.calibration import Calibration
from sws_export.errors import ExportError
from sws_export.manifest import QuantizationEntry
from sws_export.pipeline.rewrite import pass_errors
from sws_export.progress import Progress

LARGEST_ERROR: Mapping[WeightFormat, float] = {"int8": 0.1, "fp8": 0.1}
"""Layers whose output has a larger error, relative to its root mean square, are not quantized."""


def calibrated_layers(model: ir.Model) -> list[Layer]:
    """The layers of a plain graph whose inputs can be quantized.

    The convolutions of shortcuts are left out, as in NVIDIA's recipe for UNets (see `find_layers`).
    """
    return [layer for layer in find_layers(model)[0] if not _is_shortcut(layer.name)]


def quantize(
    model: ir.Model, weights: WeightFormat, calibration: Calibration | None, progress: Progress
) -> QuantizationEntry:
    """Quantize the layers of a plain graph, in place; weights are read when the graph is saved.

    Args:
        model: The plain graph.
        weights: Format of the weights.
        calibration: Ranges of the inputs of layers, which are quantized, too; None for weights only.
        progress: Receives what was quantized.

    Raises:
        ExportError: The graph has no weight that can be quantized, or no layer whose inputs can be.
    """
    exclude: dict[str, str] = {}
    if calibration is not None:
        limit = LARGEST_ERROR[calibration.activations]
        sensitive = f"its error with 8 bits is above {limit:.0%}"
        for layer in find_layers(model)[0]:
            if layer.name not in calibration.errors:
                exclude[layer.name] = "convolution of a shortcut"
            elif calibration.errors[layer.name] > limit:
                exclude[layer.name] = sensitive
        ranges = {name: found for name, found in calibration.ranges.items() if name not in exclude}
        if calibration.ranges and not ranges:
            raise ExportError(
                f"every layer has an error above {limit:.0%} with --precision {calibration.activations}; use "
                f"--weights {calibration.activations}, or leave it out"
            )
        InsertQdq(calibration.activations, ranges)(model)
    passes = QuantizeWeights(weights, exclude)
    with pass_errors():
        passes(model)
    entry = _entry(passes, calibration)
    for line in describe_quantization(entry):
        progress.log(line)
    return entry


def _entry(passes: QuantizeWeights, calibration: Calibration | None) -> QuantizationEntry:
    skipped: dict[str, list[str]] = collections.defaultdict(list)
    for layer in passes.skipped:
        skipped[layer.reason].append(layer.name)
    entry: QuantizationEntry = {
        "weights": passes.weights,
        "layers": dict(collections.Counter(layer.node.op_type for layer in passes.layers)),
        "skipped_layers": dict(skipped),
    }
    if calibration is not None:
        entry["activations"] = calibration.activations
        entry["calibration"] = {"source": calibration.source, "steps": calibration.steps}
        entry["layer_errors"] = {name: round(error, 5) for name, error in calibration.errors.items()}
    return entry


def _is_shortcut(name: str) -> bool:
    return name.endswith("conv_shortcut")


def describe_quantization(entry: QuantizationEntry) -> list[str]:
    """What is quantized and what is not, a line each."""
    layers = " and ".join(f"{count} {operator}" for operator, count in entry["layers"].items())
    what = "weights and activations" if "activations" in entry else "weights"
    skipped = [f"{len(names)} × {reason}" for reason, names in entry["skipped_layers"].items()]
    return [
        f"{entry['weights']} {what}: {layers}",
        *([f"layers that are not quantized: {', '.join(skipped)}"] if skipped else []),
    ]

"""Error with 8-bit activations by the percentile of their ranges, and with balanced channels.

    python -m benchmarks.calibration --kind int8
    python -m benchmarks.calibration --kind fp8 --unet unet/

The plain graph of a UNet is calibrated, quantized and run in ONNX Runtime; its predictions are compared with
those of the graph in float32. The trained example is calibrated over the steps of its pipeline for some
prompts and compared over those for others; another UNet over the trajectory of the validation. Steps at noise
levels below 0.25 are left out: there a prediction has a large error and hardly changes the image.

Balancing divides the channels of an activation by factors and multiplies the weights that read it: by
max|X_j|^a / max|W_j|^(1-a) for channel j, as in SmoothQuant (Xiao et al. 2022, arXiv 2211.10438). The
division is folded into the weights that write the activation: gain and bias of a norm (`norm`), or those of
the linear half of a GEGLU (`geglu`), as in AWQ (Lin et al. 2023, arXiv 2306.00978).
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from benchmarks.export import RESULTS
from graph_passes.find_layers import Layer
from graph_passes.weight_formats import WEIGHT_FORMATS, WeightFormat
from sws_export import ExportOptions, SourceOptions, SwsOptions, export
from sws_export.calibration import CalibrationSteps, calibrate, record_steps
from sws_export.calibration.calibrate import PERCENTILES
from sws_export.onnx_files import graph_specs, load_onnx
from sws_export.pipeline.quantize import LARGEST_ERROR, calibrated_layers, quantize
from sws_export.progress import SilentProgress, Stage
from sws_export.validation.onnx_runner import OnnxRunner
from sws_export.validation.sizes import validation_sizes
from sws_export.validation.trajectory import Trajectory

ROOT = Path(__file__).resolve().parent.parent

Array = npt.NDArray[np.float64]
Steps = list[Mapping[str, Any]]

EXAMPLE = ROOT / "examples" / "shapes" / "unet"
PROMPTS = (
    ("red circle left", "blue cross top and green square right", "yellow triangle bottom"),
    ("blue square left and red triangle right", "green cross bottom", "yellow circle top-left"),
)
"""To calibrate with, and to compare with."""
LOWEST_SIGMA = 0.25
_STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=WEIGHT_FORMATS, default="int8")
    parser.add_argument(
        "--unet", type=Path, default=EXAMPLE, help="directory of the UNet; default: the example"
    )
    parser.add_argument("--name", default="shapes", help="of the model in the report; default: %(default)s")
    parser.add_argument("--percentile", type=float, nargs="*", default=[99.9, 99.99, 99.999, 100.0])
    parser.add_argument(
        "--balance", nargs="*", default=["norm 0.5", "geglu 0.5", "geglu 1"], metavar="'FORM a'"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration.json")
    arguments = parser.parse_args()
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    rows = report.setdefault(arguments.name, {}).setdefault(arguments.kind, {})
    with tempfile.TemporaryDirectory(prefix="sws-export-benchmark-") as folder:
        case = Case(arguments.unet, arguments.kind, Path(folder) / "plain.onnx")
        variants = [(None, percentile) for percentile in arguments.percentile]
        variants += [(balance, PERCENTILES[arguments.kind]) for balance in arguments.balance]
        for balance, percentile in variants:
            label = f"percentile {percentile}" + (f", {balance}" if balance else "")
            rows[label] = case.figures(balance, percentile)
            print(f"{arguments.name}, {arguments.kind}, {label}: {rows[label]}", flush=True)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")


class Case:
    """A UNet with the steps to calibrate and to compare with."""

    def __init__(self, unet: Path, kind: WeightFormat, path: Path) -> None:
        self.kind = kind
        self._path = path
        options = ExportOptions(
            source=SourceOptions(precision="fp32"), sws=SwsOptions(plain=True), validate=False
        )
        export(unet, path, options)
        if unet == EXAMPLE:
            self._calibration, steps = (self._recorded(prompts) for prompts in PROMPTS)
        else:
            self._calibration, steps = self._trajectory(0), self._trajectory(1)
        self._steps = [step for step in steps if step["sigma"].max() >= LOWEST_SIGMA]
        self._expected = predictions(load_onnx(path), self._steps)
        self._largest = self._largest_inputs()

    def figures(self, balance: str | None, percentile: float) -> dict[str, Any]:
        """Errors of the prediction, those of the layers, and which of them are not quantized.

        `maximum` is relative to the largest value of a step, `rms` to the root mean square of all.
        """
        model = load_onnx(self._path)
        if balance is not None:
            form, exponent = balance.split()
            balance_channels(model, form, float(exponent), self._largest)
        layers = calibrated_layers(model)
        steps = CalibrationSteps("", len(self._calibration), self._run_calibration)
        found = calibrate(model.clone(), layers, self.kind, steps, SilentProgress(), percentile=percentile)
        quantize(model, self.kind, found, SilentProgress())
        actual = predictions(model, self._steps)
        errors = [a - e for a, e in zip(actual, self._expected, strict=True)]
        pairs = list(zip(errors, self._expected, strict=True))
        limit = LARGEST_ERROR[self.kind]
        return {
            "maximum": max(float(np.abs(e).max() / np.abs(y).max()) for e, y in pairs),
            "rms": float(np.sqrt(sum(np.sum(e**2) for e, _ in pairs) / sum(np.sum(y**2) for _, y in pairs))),
            "layers": float(np.mean(list(found.errors.values()))),
            "sensitive": [name for name, error in found.errors.items() if error > limit],
        }

    def _run_calibration(self, runner: OnnxRunner, stage: Stage) -> Steps:
        runner.run(self._calibration, stage)
        return self._calibration

    def _recorded(self, prompts: Sequence[str]) -> Steps:
        specs = graph_specs(load_onnx(self._path).graph.inputs)
        return record_steps(EXAMPLE.parent, prompts, specs, SilentProgress(), trust_code=True)

    def _trajectory(self, seed: int) -> Steps:
        model = load_onnx(self._path)
        specs = graph_specs(model.graph.inputs)
        trajectory = Trajectory(specs, validation_sizes(8, 0), _STEPS, seed)
        runner, steps = OnnxRunner(model), Steps()
        with SilentProgress().stage("trajectory") as stage:
            for step in trajectory.steps():
                steps.append(trajectory.inputs(step) | {"sigma": step.sigma})
                (outputs,) = runner.run(steps[-1:], stage)
                trajectory.advance(step, outputs["out_sample"].astype(np.float64))
        return steps

    def _largest_inputs(self) -> dict[str, Array]:
        """Largest absolute value of each channel of the inputs of the layers, by layer."""
        model = load_onnx(self._path)
        layers = [layer for layer in calibrated_layers(model) if layer.node.inputs[0] is not None]
        names = {layer.name: str(layer.node.inputs[0].name) for layer in layers if layer.node.inputs[0]}
        axes = {names[layer.name]: 1 if layer.node.op_type == "Conv" else -1 for layer in layers}
        for layer in layers:
            value = layer.node.inputs[0]
            if value is not None and not value.is_graph_input() and not value.is_graph_output():
                model.graph.outputs.append(value)
        largest: dict[str, Array] = {}

        def observe(name: str, value: npt.NDArray[Any]) -> None:
            channels = np.moveaxis(np.abs(value.astype(np.float64)), axes[name], -1)
            found = channels.reshape(-1, channels.shape[-1]).max(axis=0)
            largest[name] = np.maximum(largest.get(name, 0.0), found)

        runner = OnnxRunner(model, observed=set(axes))
        runner.observe = observe
        with SilentProgress().stage("ranges") as stage:
            runner.run(self._calibration, stage)
        return {layer: largest[name] for layer, name in names.items()}


def predictions(model: ir.Model, steps: Steps) -> list[Array]:
    """The prediction of each step."""
    with SilentProgress().stage("run") as stage:
        return [found["out_sample"].astype(np.float64) for found in OnnxRunner(model).run(steps, stage)]


def balance_channels(model: ir.Model, form: str, exponent: float, largest: Mapping[str, Array]) -> None:
    """Balance the activations that only calibrated layers read, in place.

    Args:
        model: A plain graph.
        form: `norm`, or `geglu`.
        exponent: a, the share of the range that moves from the activations to the weights.
        largest: Largest absolute value of each channel of the inputs of the layers.
    """
    layers = {layer.node: layer for layer in calibrated_layers(model)}
    for node in list(model.graph):
        readers = [layers.get(user) for user in node.outputs[0].consumers()]
        if not readers or None in readers:
            continue
        found = [layer for layer in readers if layer is not None]
        writers = _norm(node) if form == "norm" else _linear_half(node)
        if writers:
            factors = _factors(found, largest[found[0].name], exponent)
            for value, axis in writers:
                # The other half of a GEGLU has factors of 1.
                _scale(value, np.append(1 / factors, np.ones(value_size(value, axis) - len(factors))), axis)
            for layer in found:
                _scale(layer.weight, factors, 1 - layer.axis)


def value_size(value: ir.Value, axis: int) -> int:
    """Elements of an initializer along an axis."""
    assert value.const_value is not None
    return int(value.const_value.shape.numpy()[axis])


def _norm(node: ir.Node) -> list[tuple[ir.Value, int]]:
    """Gain and bias of a norm, which no other norm has after this."""
    if node.op_type not in ("LayerNormalization", "GroupNormalization"):
        return []
    assert node.graph is not None
    for index in (1, 2):
        shared = node.inputs[index]
        if shared is not None and len(shared.uses()) > 1:
            # Norms of random weights have the same gains and biases.
            own = ir.val(f"{node.name}/{index}", const_value=shared.const_value)
            node.graph.register_initializer(own)
            node.replace_input_with(index, own)
    return [(value, 0) for value in node.inputs[1:3] if value is not None]


def _linear_half(node: ir.Node) -> list[tuple[ir.Value, int]]:
    """Bias and weight of the linear layer that writes both halves of a GEGLU, each with its output axis."""
    split, gelu = (
        (value and value.producer() for value in node.inputs) if node.op_type == "Mul" else (None, None)
    )
    if split is None or gelu is None or (split.op_type, gelu.op_type) != ("Split", "Gelu"):
        return []
    add = split.inputs[0].producer()  # type: ignore[union-attr]
    product, bias = add.inputs  # type: ignore[union-attr]
    weight = product.producer().inputs[1].producer().inputs[0]  # type: ignore[union-attr]
    return [(bias, 0), (weight, 0)]  # type: ignore[list-item]


def _factors(layers: Sequence[Layer], largest: Array, exponent: float) -> Array:
    """The factor of each channel, with a geometric mean of 1."""
    weights = np.zeros_like(largest)
    for layer in layers:
        assert layer.weight.const_value is not None
        array = np.abs(layer.weight.const_value.numpy().astype(np.float64))
        channels = np.moveaxis(array, 1 - layer.axis, 0).reshape(len(largest), -1)
        weights = np.maximum(weights, channels.max(axis=1))
    factors = np.ones_like(largest)
    used = (largest > 0) & (weights > 0)
    factors[used] = largest[used] ** exponent / weights[used] ** (1 - exponent)
    return np.asarray(factors / np.exp(np.log(factors).mean()))


def _scale(value: ir.Value, factors: Array, axis: int) -> None:
    assert value.const_value is not None
    array = value.const_value.numpy()
    shape = [-1 if dimension == axis else 1 for dimension in range(array.ndim)]
    value.const_value = ir.tensor((array * factors.reshape(shape)).astype(array.dtype), name=value.name)


if __name__ == "__main__":
    main()

"""Ranges, layer errors, and the steps that they are measured on."""

import weakref
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from diffusers.utils.logging import enable_progress_bar

from graph_passes.find_layers import Layer, find_layers
from graph_passes.insert_qdq import InsertQdq
from graph_passes.quantize_weights import FORMATS, QuantizeWeights, rounded_weight
from graph_passes.weight_formats import WEIGHT_FORMATS, WeightFormat
from sws_export.calibration import calibrate, record_steps, recorded_steps
from sws_export.calibration.layer_error import LayerError
from sws_export.errors import CheckpointError, ExportError, OptionError
from sws_export.progress import SilentProgress
from sws_export.tensors import MID_RESIDUAL, TensorSpec
from tests.conftest import RunOnnx
from tests.export_runs import TRAINED, RecordingProgress
from tests.graph_passes.layer_models import QUANTIZED, layer_feeds, layer_model

SPECS = (
    TensorSpec("sample", "float32", ("batch", 3, "height", "width")),
    TensorSpec("timestep", "float32", ("batch",)),
    TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", 64)),
)


def steps(count: int) -> list[dict[str, Any]]:
    return [{name: (step + 1) * value for name, value in layer_feeds().items()} for step in range(count)]


def test_ranges_and_errors_of_all_layers() -> None:
    model = layer_model()
    layers, _ = find_layers(layer_model())
    found = calibrate(model, layers, "fp8", recorded_steps(steps(3), "three steps"), SilentProgress())
    assert found.ranges.keys() == found.errors.keys() == QUANTIZED.keys()
    text = 3 * np.abs(layer_feeds()["encoder_hidden_states"]).max()
    assert found.ranges["mid_block.to_q"] == found.ranges["mid_block.to_k"] == pytest.approx(text, rel=1e-3)
    assert all(0.01 < error < 0.06 for error in found.errors.values())
    assert (found.activations, found.steps, found.source) == ("fp8", 3, "three steps")
    # The few values of these inputs have no outliers that a higher percentile would clip.
    three = recorded_steps(steps(3), "")
    clipped = calibrate(layer_model(), layers, "int8", three, SilentProgress(), percentile=99.0)
    assert 0.5 * text < clipped.ranges["mid_block.to_q"] < 0.9 * text


@pytest.mark.parametrize("activations", WEIGHT_FORMATS)
def test_the_error_of_a_linear_layer(activations: WeightFormat) -> None:
    layer = next(layer for layer in find_layers(layer_model())[0] if layer.name == "mid_block.to_q")
    x = layer_feeds()["encoder_hidden_states"]
    error = LayerError(layer, activations, 3.0, 1)
    error.add(x)
    assert layer.weight.const_value is not None
    weight = layer.weight.const_value.numpy().astype(np.float64)
    rounded = rounded_weight(layer.weight.const_value, layer.axis, activations).astype(np.float64)
    dtype = ir.DataType.INT8 if activations == "int8" else ir.DataType.FLOAT8E4M3FN
    largest = 127 if activations == "int8" else 448
    scale = 3.0 / largest
    scaled = np.clip(x.astype(np.float64) / scale, -largest, largest)
    values = np.rint(scaled) if activations == "int8" else scaled.astype(dtype.numpy()).astype(np.float64)
    values = values * scale
    difference = values @ rounded.T - x @ weight.T
    expected = np.linalg.norm(difference) / np.linalg.norm(x @ weight.T)
    assert error.relative == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("activations", WEIGHT_FORMATS)
def test_the_error_has_the_scale_of_the_graph(activations: WeightFormat, run_onnx: RunOnnx) -> None:
    """Small inputs in float16, whose scale is limited."""
    name, half = "mid_block.to_q", ir.DataType.FLOAT16
    feeds = layer_feeds(half)
    text = feeds["encoder_hidden_states"] = feeds["encoder_hidden_states"] * np.float16(1e-3)
    largest = float(np.abs(text).max())

    def output(model: ir.Model) -> Any:
        (node,) = (node for node in model.graph if node.name == f"{name}/MatMul")
        model.graph.outputs.append(node.outputs[0])
        return run_onnx(model, feeds)[str(node.outputs[0].name)].astype(np.float64)

    quantized = layer_model(half)
    InsertQdq(activations, {name: largest})(quantized)
    QuantizeWeights(activations)(quantized)
    exact, rounded = output(layer_model(half)), output(quantized)
    (layer,) = (layer for layer in find_layers(layer_model(half))[0] if layer.name == name)
    error = LayerError(layer, activations, largest, 1)
    error.add(text)
    expected = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert error.relative == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("activations", WEIGHT_FORMATS)
def test_the_error_of_a_convolution(activations: WeightFormat, run_onnx: RunOnnx) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 64, 9, 7), np.float32)
    weight = (
        random.standard_normal((64, 32, 3, 3), np.float32) * np.geomspace(0.1, 1, 64)[:, None, None, None]
    )
    attributes = {"strides": [2, 1], "pads": [1, 0, 2, 3], "dilations": [1, 2], "group": 2}

    def graph(weight: Any) -> ir.Model:
        source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(x.shape))
        value = ir.val("weight", const_value=ir.tensor(weight.astype(np.float32), name="weight"))
        node = ir.node("Conv", [source, value], attributes, name="conv/Conv")
        node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
        built = ir.Graph([source], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 23})
        return ir.Model(built, ir_version=10)

    node = next(iter(graph(weight).graph))
    assert node.inputs[1] is not None
    layer = Layer("conv", node, node.inputs[1], 0)
    error = LayerError(layer, activations, 3.0, 1)
    error.add(x)
    assert layer.weight.const_value is not None
    scale = 3.0 / FORMATS[activations].largest
    steps = np.clip(x / scale, -FORMATS[activations].largest, FORMATS[activations].largest)
    steps = np.rint(steps) if activations == "int8" else steps.astype(FORMATS["fp8"].dtype.numpy())
    rounded = steps.astype(np.float32) * np.float32(scale)
    exact = run_onnx(graph(weight), {"x": x})["y"]
    found = run_onnx(graph(rounded_weight(layer.weight.const_value, 0, activations)), {"x": rounded})["y"]
    expected = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 0.005 < expected < 0.1
    assert error.relative == pytest.approx(expected, rel=1e-3)


def test_weights_are_read_once_and_inputs_are_not_held() -> None:
    layer = next(layer for layer in find_layers(layer_model())[0] if layer.name == "mid_block.to_q")
    held, reads = layer.weight.const_value, []
    assert held is not None

    def read() -> ir.TensorProtocol:
        reads.append(1)
        return held

    layer.weight.const_value = ir.LazyTensor(read, held.dtype, shape=ir.Shape(held.shape.numpy()))
    error = LayerError(layer, "int8", 3.0, 3)
    first = layer_feeds()["encoder_hidden_states"]
    released = weakref.ref(first)
    error.add(first)
    del first
    assert released() is None
    after_one = len(reads)
    error.add(layer_feeds()["encoder_hidden_states"])
    error.add(layer_feeds()["encoder_hidden_states"])
    assert len(reads) == after_one
    assert not [value for value in vars(error).values() if isinstance(value, tuple)]


def test_inputs_that_are_not_finite_are_refused() -> None:
    layers, _ = find_layers(layer_model())
    damaged = steps(1)
    damaged[0]["encoder_hidden_states"][0, 0, 0] = np.inf
    with pytest.raises(
        ExportError, match=r"mid_block\.to_q: its input contains NaN or Inf .* over two prompts"
    ):
        calibrate(layer_model(), layers, "int8", recorded_steps(damaged, "two prompts"), SilentProgress())


def test_many_recorded_steps_are_thinned_out() -> None:
    class Runner:
        def run(self, steps: Any, stage: Any) -> None: ...

    found = recorded_steps([{"number": np.array(n)} for n in range(40)], "")
    chosen = found.run(Runner(), None)  # type: ignore[arg-type]
    assert found.count == len(chosen)
    numbers = [int(step["number"]) for step in chosen]
    assert (len(numbers), numbers[0], numbers[-1]) == (16, 0, 39)


# diffusers 0.42 turns a tensor into an array in a way that numpy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_steps_of_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    enable_progress_bar()
    prompts = ["red circle left", "blue cross top"]
    residual = TensorSpec(MID_RESIDUAL, "float32", ("batch", 96, "height/4", "width/4"))
    progress = RecordingProgress(SilentProgress())
    found = record_steps(TRAINED.parent, prompts, (*SPECS, residual), progress, trust_code=True, steps=2)
    (warning,) = progress.lines
    assert warning[0]
    assert "the residuals of a ControlNet are 0 in the calibration over shapes" in warning[1]
    assert found[0][MID_RESIDUAL].shape == (2, 96, 8, 8)
    assert capsys.readouterr().err == ""
    assert len(found) == 4
    assert found[0].keys() == {spec.name for spec in (*SPECS, residual)} | {"sigma", "intensity"}
    assert found[0]["sample"].shape == (2, 3, 32, 32)
    assert found[0]["timestep"].shape == found[0]["sigma"].shape == (2,)
    assert found[0]["sigma"][0] > found[1]["sigma"][0]
    assert not np.array_equal(found[0]["encoder_hidden_states"], found[2]["encoder_hidden_states"])
    with pytest.raises(OptionError, match="trust"):
        record_steps(TRAINED.parent, prompts, SPECS, SilentProgress(), trust_code=False)
    narrow = (*SPECS[:2], TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", 7)))
    with pytest.raises(
        CheckpointError, match=r"of shape \[2, 8, 64\], the exported one takes \[batch, tokens, 7\]"
    ):
        record_steps(TRAINED.parent, prompts, narrow, SilentProgress(), trust_code=True)
    missing = (*SPECS, TensorSpec("text_embeds", "float32", ("batch", 8)))
    with pytest.raises(CheckpointError, match="its UNet is called without text_embeds"):
        record_steps(TRAINED.parent, prompts, missing, SilentProgress(), trust_code=True)

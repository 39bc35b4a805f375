"""8-bit weights: the operators, the arithmetic, and how little is held in memory."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.errors import GraphError
from graph_passes.quantize_weights import QuantizeWeights, restored_tensor
from graph_passes.weight_formats import WeightFormat
from tests.conftest import RunOnnx
from tests.graph_passes.layer_models import QUANTIZED, SKIPPED, layer_feeds, layer_model
from tests.graph_passes.small_models import SiteSpec, build_model, graph_bytes, op_counts

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
FORMATS: tuple[WeightFormat, ...] = ("int8", "fp8")


def quantized(weights: WeightFormat, dtype: ir.DataType = FLOAT) -> ir.Model:
    model = layer_model(dtype)
    assert QuantizeWeights(weights)(model).modified
    return model


def data(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def restored(array: np.ndarray, axis: int, weights: WeightFormat) -> np.ndarray:
    """What an 8-bit weight stands for, computed directly, with scales of the dtype of `array`."""
    channels = np.moveaxis(array.astype(np.float64), axis, 0)
    flat = channels.reshape(len(channels), -1)
    scale = (np.abs(flat).max(axis=1) / (127 if weights == "int8" else 448)).astype(array.dtype)
    steps = flat / scale.astype(np.float64)[:, None]
    steps = np.rint(steps) if weights == "int8" else steps.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return np.moveaxis((steps * scale.astype(np.float64)[:, None]).reshape(channels.shape), 0, axis)


@pytest.mark.parametrize("weights", FORMATS)
def test_one_dequantization_per_layer_and_nothing_else(weights: WeightFormat) -> None:
    before = op_counts(layer_model())
    model = quantized(weights)
    assert op_counts(model) == before | {"DequantizeLinear": len(QUANTIZED)}
    for name, axis in QUANTIZED.items():
        node = next(node for node in model.graph if node.name == f"{name}.weight/DequantizeLinear")
        assert [value and value.name for value in node.inputs] == [
            f"{name}.weight_{weights}",
            f"{name}.weight_scale",
        ]
        assert node.attributes.get_int("axis") == axis
        assert f"{name}.weight" not in model.graph.initializers
        expected = ir.DataType.INT8 if weights == "int8" else ir.DataType.FLOAT8E4M3FN
        assert model.graph.initializers[f"{name}.weight_{weights}"].dtype == expected
    original = layer_model()
    for name in SKIPPED:
        np.testing.assert_array_equal(data(model, f"{name}.weight"), data(original, f"{name}.weight"))


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("weights", FORMATS)
def test_it_computes_what_rounded_weights_do(
    weights: WeightFormat, dtype: ir.DataType, run_onnx: RunOnnx
) -> None:
    expected, original = layer_model(dtype), layer_model(dtype)
    for name, axis in QUANTIZED.items():
        value = expected.graph.initializers[f"{name}.weight"]
        rounded = restored(data(original, f"{name}.weight"), axis, weights)
        value.const_value = ir.tensor(rounded.astype(dtype.numpy()), name=value.name)
    feeds = layer_feeds(dtype)
    found = run_onnx(quantized(weights, dtype), feeds)["out_sample"].astype(np.float64)
    exact = run_onnx(original, feeds)["out_sample"].astype(np.float64)
    largest = np.abs(exact).max()
    rounded = run_onnx(expected, feeds)["out_sample"].astype(np.float64)
    assert np.abs(found - rounded).max() < (1e-5 if dtype == FLOAT else 5e-3) * largest
    assert 1e-5 * largest < np.abs(found - exact).max() < 0.1 * largest


def test_channels_of_zeros_and_of_tiny_weights() -> None:
    model = layer_model(HALF)
    weight = model.graph.initializers["mid_block.to_q.weight"]
    array = data(model, "mid_block.to_q.weight").copy()
    array[0], array[1] = 0, np.finfo(np.float16).smallest_subnormal
    weight.const_value = ir.tensor(array, name=weight.name)
    QuantizeWeights("int8")(model)
    scales = data(model, "mid_block.to_q.weight_scale").astype(np.float64)
    found = data(model, "mid_block.to_q.weight_int8") * scales[:, None]
    assert (scales > 0).all()
    np.testing.assert_array_equal(found[:2], array[:2].astype(np.float64))


def test_weights_are_read_when_the_graph_is_saved(tmp_path: Path) -> None:
    model, reads = layer_model(), []
    weight = model.graph.initializers["mid_block.to_k.weight"]
    held = weight.const_value
    assert held is not None

    def read() -> ir.TensorProtocol:
        reads.append(1)
        assert held is not None
        return held

    weight.const_value = ir.LazyTensor(read, FLOAT, shape=ir.Shape(held.shape.numpy()), name=held.name)
    QuantizeWeights("int8")(model)
    assert not reads
    ir.save(model, tmp_path / "model.onnx")
    assert reads
    value = model.graph.initializers["mid_block.to_k.weight_int8"]
    again = restored_tensor(value, {"mid_block.to_k.weight": held})
    assert again is not None
    np.testing.assert_array_equal(again.numpy(), data(model, "mid_block.to_k.weight_int8"))
    assert (
        restored_tensor(
            model.graph.initializers["mid_block.to_k.weight_scale"], {"mid_block.to_k.weight": held}
        )
        is None
    )


def test_a_graph_without_large_weights_is_refused_unchanged() -> None:
    model = build_model([SiteSpec()])
    before = graph_bytes(model)
    with pytest.raises(ir.passes.PassError) as caught:
        ir.passes.Sequential(QuantizeWeights("int8"))(model)
    assert isinstance(caught.value.__cause__, GraphError)
    assert "leave out --weights" in str(caught.value.__cause__)
    assert graph_bytes(model) == before


@pytest.mark.parametrize("weights", FORMATS)
def test_a_second_run_changes_nothing(weights: WeightFormat) -> None:
    model = quantized(weights)
    before = graph_bytes(model)
    assert not QuantizeWeights(weights)(model).modified
    assert graph_bytes(model) == before

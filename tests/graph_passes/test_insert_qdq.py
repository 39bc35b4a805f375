"""8-bit activations: the operators, the rounding, and the sites that are still found behind them."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.find_layers import find_layers
from graph_passes.find_projection_inputs import find_projection_inputs
from graph_passes.find_sites import find_sites
from graph_passes.insert_qdq import InsertQdq
from graph_passes.weight_formats import WEIGHT_FORMATS, WeightFormat
from tests.conftest import RunOnnx, ShapesModel
from tests.graph_passes.layer_models import QUANTIZED, layer_feeds, layer_model
from tests.graph_passes.small_models import graph_bytes, op_counts

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
RANGES = dict.fromkeys(QUANTIZED, 3.0)
# to_q and to_k read the same text.
TENSORS = len(QUANTIZED) - 1


def with_qdq(activations: WeightFormat, dtype: ir.DataType = FLOAT) -> ir.Model:
    model = layer_model(dtype)
    assert InsertQdq(activations, RANGES)(model).modified
    return model


@pytest.mark.parametrize("activations", WEIGHT_FORMATS)
def test_one_pair_of_nodes_per_tensor(activations: WeightFormat) -> None:
    model = with_qdq(activations)
    added = {"QuantizeLinear": TENSORS, "DequantizeLinear": TENSORS}
    assert op_counts(model) == op_counts(layer_model()) | added
    inputs = {node.name: node.inputs[0] for node in model.graph}
    text = inputs["mid_block.to_q/MatMul"]
    assert text is inputs["mid_block.to_k/MatMul"]
    assert text is not None
    assert text.dtype == FLOAT
    producer = text.producer()
    assert producer is not None
    assert producer.inputs[0] is not None
    expected = ir.DataType.INT8 if activations == "int8" else ir.DataType.FLOAT8E4M3FN
    assert producer.inputs[0].dtype == expected
    for name in ("mid_block.small/MatMul", "mid_block.tied/MatMul", "conv_in/Conv", "conv_out/Conv"):
        value = inputs[name]
        assert value is not None
        assert value.producer() is None or value.producer().op_type != "DequantizeLinear"  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("activations", WEIGHT_FORMATS)
def test_inputs_are_rounded_and_clipped(
    activations: WeightFormat, dtype: ir.DataType, run_onnx: RunOnnx
) -> None:
    model = with_qdq(activations, dtype)
    restored = next(node for node in model.graph if node.name == "mid_block.to_q/MatMul").inputs[0]
    assert restored is not None
    model.graph.outputs.append(restored)
    feeds = layer_feeds(dtype)
    found = run_onnx(model, feeds)[str(restored.name)].astype(np.float64)
    values = feeds["encoder_hidden_states"].astype(np.float64)
    largest = 127 if activations == "int8" else 448
    scale = float(np.array(3.0 / largest, dtype.numpy()))
    steps = values / scale
    if activations == "int8":
        expected = np.clip(np.rint(steps), -128, 127) * scale
        assert np.abs(found - expected).max() <= (1e-6 if dtype == FLOAT else 1.05 * scale)
    else:
        expected = np.clip(steps, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
        assert np.abs(found - expected).max() <= (1e-6 if dtype == FLOAT else 0.26)
    assert np.abs(found).max() < 3.1 < np.abs(values).max()


def test_the_scale_is_that_of_the_largest_range() -> None:
    """Of the layers that read a tensor; it is a normal number in float16."""
    model = layer_model(HALF)
    InsertQdq("int8", RANGES | {"mid_block.to_q": 2.0, "mid_block.to_k": 5.0, "mid_block.gate": 1e-6})(model)
    nodes = {node.name: node for node in model.graph}
    for name, expected in (("mid_block.to_q/MatMul", 5.0 / 127), ("mid_block.gate/Gemm", 2.0**-14)):
        source = nodes[name].inputs[0]
        assert source is not None
        restore = source.producer()
        assert restore is not None
        scale = restore.inputs[1]
        assert scale is not None
        assert scale.const_value is not None
        assert float(scale.const_value.numpy()) == pytest.approx(expected, rel=1e-3)


def test_layers_without_a_range_are_left_alone() -> None:
    model = layer_model()
    before = graph_bytes(model)
    others = dict.fromkeys(("conv_in", "time_embedding.linear_1", "mid_block.small", "elsewhere"), 1.0)
    assert not InsertQdq("int8", others)(model).modified
    assert graph_bytes(model) == before


@pytest.mark.parametrize("activations", WEIGHT_FORMATS)
def test_a_second_run_changes_nothing(activations: WeightFormat) -> None:
    model = with_qdq(activations)
    before = graph_bytes(model)
    assert not InsertQdq(activations, RANGES)(model).modified
    assert graph_bytes(model) == before


def test_sites_are_found_and_read_the_unrounded_tensors(shapes_model: ShapesModel) -> None:
    plain, model = shapes_model("fp32"), shapes_model("fp32")
    projections = [layer.name for layer in find_layers(model)[0] if ".to_" in layer.name]
    assert InsertQdq("int8", dict.fromkeys(projections, 4.0))(model).modified
    sites, skipped = find_sites(model, cross_attention=True)
    expected, _ = find_sites(plain, cross_attention=True)
    assert [site.name for site in sites] == [site.name for site in expected]
    assert not skipped
    texts = [site for site in sites if site.name.endswith("attn2")]
    assert len(texts) == 7
    for site, without in zip(texts, (site for site in expected if site.name.endswith("attn2")), strict=True):
        found, read = find_projection_inputs(site), find_projection_inputs(without)
        assert found.text.name == "encoder_hidden_states"
        assert found.hidden.name == read.hidden.name
        producer = found.hidden.producer()
        assert producer is not None
        assert producer.op_type == "LayerNormalization"

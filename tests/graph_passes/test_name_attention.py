"""Attention of 4-D tensors is called by the name of TensorRT's operator; other attention stays."""

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.name_attention import NameAttention
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import op_counts

SHAPE = (2, 2, 5, 8)


def attention(attributes: dict[str, float | int], rank: int = 4) -> ir.Model:
    """Attention of q, k and v."""
    shape = SHAPE if rank == 4 else (2, 5, 16)
    inputs = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape)) for name in "qkv"
    ]
    node = ir.node("Attention", inputs, attributes, name="attention")
    (y,) = node.outputs
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    graph = ir.Graph(inputs, [y], nodes=[node], opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def test_the_function_is_the_same_attention(run_onnx: RunOnnx) -> None:
    model = attention({"scale": 1.0})
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(SHAPE).astype(np.float32) for name in "qkv"}
    expected = run_onnx(model, values)["y"]
    assert NameAttention()(model).modified
    assert op_counts(model) == {"sws.TRT_Attention": 1}
    assert (run_onnx(model, values)["y"] == expected).all()
    assert not NameAttention()(model).modified


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3}])
def test_a_scale_goes_into_the_queries(run_onnx: RunOnnx, attributes: dict[str, float | int]) -> None:
    model = attention(attributes)
    rng = np.random.default_rng(0)
    values = {name: 3 * rng.standard_normal(SHAPE).astype(np.float32) for name in "qkv"}
    expected = run_onnx(model, values)["y"]
    assert NameAttention()(model).modified
    assert op_counts(model) == {"Mul": 1, "sws.TRT_Attention": 1}
    np.testing.assert_allclose(run_onnx(model, values)["y"], expected, rtol=1e-5, atol=1e-5)
    assert not NameAttention()(model).modified


@pytest.mark.parametrize(
    ("attributes", "rank"),
    [
        ({"scale": 1.0, "is_causal": 1}, 4),
        ({"scale": 1.0, "q_num_heads": 2, "kv_num_heads": 2}, 3),
    ],
)
def test_other_attention_stays(attributes: dict[str, float | int], rank: int) -> None:
    assert not NameAttention()(attention(attributes, rank)).modified

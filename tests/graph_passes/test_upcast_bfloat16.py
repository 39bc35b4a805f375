"""The float32 copy of a bfloat16 graph: weights stay bfloat16, all else is float32."""

import collections

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.upcast_bfloat16 import UpcastBfloat16
from tests.conftest import RunOnnx

BF16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT
WEIGHT = np.random.default_rng(0).standard_normal((4, 4)).astype(ml_dtypes.bfloat16)


def model(dtype: ir.DataType) -> ir.Model:
    """relu(cast(x) w) w + constant, x in float32."""
    x = ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape([2, 4]))
    tensor = ir.tensor(WEIGHT.astype(dtype.numpy()), name="w")
    w = ir.Value(name="w", type=ir.TensorType(dtype), shape=ir.Shape([4, 4]), const_value=tensor)
    constant = ir.node("Constant", [], {"value": ir.tensor(np.array(0.5, dtype.numpy()))})
    cast = ir.node("Cast", [x], {"to": int(dtype)})
    first = ir.node("MatMul", [cast.outputs[0], w])
    relu = ir.node("Relu", first.outputs)
    second = ir.node("MatMul", [relu.outputs[0], w])
    total = ir.node("Add", [second.outputs[0], constant.outputs[0]])
    nodes = [constant, cast, first, relu, second, total]
    for place, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].type = f"v{place}", ir.TensorType(dtype)
    graph = ir.Graph([x], total.outputs, nodes=nodes, initializers=[w], opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def operators(graph: ir.Graph) -> dict[str, int]:
    return dict(collections.Counter(node.op_type for node in graph))


def test_one_cast_per_weight_and_no_other_operator() -> None:
    graph = model(BF16)
    before = operators(graph.graph)
    assert UpcastBfloat16()(graph).modified
    assert operators(graph.graph) == before | {"Cast": 2}
    assert graph.graph.initializers["w"].dtype == BF16
    assert all(output.dtype == FLOAT for node in graph.graph for output in node.outputs)


def test_results_equal_float32_with_rounded_weights(run_onnx: RunOnnx) -> None:
    graph = model(BF16)
    UpcastBfloat16()(graph)
    x = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
    np.testing.assert_array_equal(run_onnx(graph, {"x": x})["v5"], run_onnx(model(FLOAT), {"x": x})["v5"])


@pytest.mark.parametrize("dtype", [FLOAT, ir.DataType.FLOAT16])
def test_other_precisions_do_not_change(dtype: ir.DataType) -> None:
    other = model(dtype)
    before = ir.to_proto(other).SerializeToString()
    assert not UpcastBfloat16()(other).modified
    assert ir.to_proto(other).SerializeToString() == before


def test_a_second_run_changes_nothing() -> None:
    graph = model(BF16)
    UpcastBfloat16()(graph)
    before = ir.to_proto(graph).SerializeToString()
    assert not UpcastBfloat16()(graph).modified
    assert ir.to_proto(graph).SerializeToString() == before

"""Products that only delay a node are removed, and what they waited for."""

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.clean_graph import CleanGraph
from graph_passes.functions.building import after, define_function
from graph_passes.lower_functions import LowerFunctions
from graph_passes.remove_waits import RemoveWaits
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import op_counts

FLOAT = ir.DataType.FLOAT


def waiting(low: float = 1.0, high: float = 1.0, shape: tuple[int, ...] = (2, 4, 3)) -> ir.Model:
    """-x, multiplied by the largest of `earlier` that is clipped."""
    names = {"x": shape, "earlier": (2, 4, 3)}
    x, earlier = (
        ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape(sizes)) for name, sizes in names.items()
    )
    bounds = []
    for name, number in {"low": low, "high": high}.items():
        tensor = ir.tensor(np.array(number, np.float32), name=name)
        bounds.append(ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape([]), const_value=tensor))
    largest = ir.node("ReduceMax", [earlier], {"keepdims": 1})
    clipped = ir.node("Clip", [*largest.outputs, *bounds])
    product = ir.node("Mul", [x, *clipped.outputs])
    product.outputs[0].shape = ir.Shape(np.broadcast_shapes(shape, (1, 1, 1)))
    negative = ir.node("Neg", product.outputs)
    negative.outputs[0].name, negative.outputs[0].type = "y", x.type
    nodes = [largest, clipped, product, negative]
    graph = ir.Graph(
        [x, earlier], negative.outputs, nodes=nodes, initializers=bounds, opset_imports={"": 23}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def test_a_wait_is_removed(run_onnx: RunOnnx) -> None:
    model = waiting()
    random = np.random.default_rng(0)
    values = {name: random.standard_normal((2, 4, 3), np.float32) for name in ("x", "earlier")}
    assert RemoveWaits()(model).modified
    assert op_counts(model) == {"Neg": 1}
    np.testing.assert_array_equal(run_onnx(model, values)["y"], -values["x"])
    assert not RemoveWaits()(model).modified


@pytest.mark.parametrize("model", [waiting(low=0.0), waiting(high=2.0), waiting(shape=(3,))])
def test_other_products_stay(model: ir.Model) -> None:
    """Of a number that can differ from 1, and one that has another shape than its first factor."""
    assert not RemoveWaits()(model).modified


def test_what_functions_wait_for() -> None:
    """`after` of the functions is what the pass looks for."""
    x = ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape([2, 3]))
    function = define_function(
        "Waiting", lambda op, x: op.Neg(after(op, x, op.ReduceMax(x))), {"x": FLOAT}, ["y"]
    )
    node = ir.node("Waiting", [x], domain="sws", name="call")
    node.outputs[0].name, node.outputs[0].type = "y", x.type
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23, "sws": 1}, name="g")
    model = ir.Model(graph, ir_version=10, functions=[function])
    for each in (LowerFunctions(), CleanGraph()):
        each(model)
    for product in model.graph:
        if product.op_type == "Mul":
            product.outputs[0].shape = x.shape
    assert RemoveWaits()(model).modified
    assert op_counts(model) == {"Neg": 1}

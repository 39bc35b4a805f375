"""`Mul` nodes that only order others are removed, and what they were computed from."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from graph_passes.clean_graph import CleanGraph
from graph_passes.functions.building import after, define_function
from graph_passes.lower_functions import LowerFunctions
from graph_passes.remove_ordering import RemoveOrdering
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import op_counts

FLOAT = ir.DataType.FLOAT


def ordered(
    low: float = 1.0,
    high: float = 1.0,
    shape: tuple[int | None, ...] = (2, 4, 3),
    product_shape: tuple[int | None, ...] = (2, 4, 3),
    *,
    is_output: bool = False,
) -> ir.Model:
    """-x, multiplied by the largest of `earlier` that is clipped; the product may be an output itself."""
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
    product.outputs[0].shape = ir.Shape(product_shape)
    product.outputs[0].name, product.outputs[0].type = "product", x.type
    negative = ir.node("Neg", product.outputs)
    negative.outputs[0].name, negative.outputs[0].type = "y", x.type
    nodes = [largest, clipped, product, negative]
    graph = ir.Graph(
        [x, earlier],
        [*negative.outputs, *(product.outputs if is_output else [])],
        nodes=nodes,
        initializers=bounds,
        opset_imports={"": 23},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


def test_a_product_by_one_is_removed(run_onnx: RunOnnx) -> None:
    model = ordered()
    random = np.random.default_rng(0)
    values = {name: random.standard_normal((2, 4, 3), np.float32) for name in ("x", "earlier")}
    assert RemoveOrdering()(model).modified
    assert op_counts(model) == {"Neg": 1}
    np.testing.assert_array_equal(run_onnx(model, values)["y"], -values["x"])
    assert not RemoveOrdering()(model).modified


@pytest.mark.parametrize(
    "model",
    [
        ordered(low=0.0),
        ordered(high=2.0),
        ordered(shape=(3,), product_shape=(1, 1, 3)),
        ordered(shape=(None, 4, 3), product_shape=(None, 4, 3)),  # the two unknown sizes can differ
        ordered(is_output=True),
    ],
)
def test_other_products_stay(model: ir.Model) -> None:
    """Of a number that can differ from 1, of another shape than the first factor, and outputs."""
    assert not RemoveOrdering()(model).modified


def test_what_orders_the_nodes_of_functions() -> None:
    """`after` of the functions is what the pass looks for."""
    x = ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape([2, 3]))
    function = define_function(
        "Ordered", lambda op, x: op.Neg(after(op, x, op.ReduceMax(x))), {"x": FLOAT}, ["y"]
    )
    node = ir.node("Ordered", [x], domain="sws", name="call")
    node.outputs[0].name, node.outputs[0].type = "y", x.type
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23, "sws": 1}, name="g")
    model = ir.Model(graph, ir_version=10, functions=[function])
    for each in (LowerFunctions(), CleanGraph()):
        each(model)
    for product in model.graph:
        if product.op_type == "Mul":
            product.outputs[0].shape = x.shape
    assert RemoveOrdering()(model).modified
    assert op_counts(model) == {"Neg": 1}


def test_onnxruntime_keeps_a_cast_that_rounds() -> None:
    """And the one back, between which `RemoveOrdering` may remove a product."""
    x = ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape([3]))
    half = ir.node("Cast", [x], {"to": ir.DataType.FLOAT16})
    back = ir.node("Cast", half.outputs, {"to": FLOAT})
    double = ir.node("Add", [*back.outputs, *back.outputs])
    double.outputs[0].name, double.outputs[0].type = "y", x.type
    graph = ir.Graph([x], double.outputs, nodes=[half, back, double], opset_imports={"": 23}, name="g")
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    values = np.array([0.1, 1.0001, 3.3333], np.float32)
    (found,) = session.run(None, {"x": values})
    np.testing.assert_array_equal(found, 2 * values.astype(np.float16).astype(np.float32))

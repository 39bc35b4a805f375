"""Unused and duplicate nodes and metadata of the exporter are removed, and nothing else."""

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.clean_graph import CleanGraph
from graph_passes.lower_functions import LowerFunctions
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import SiteSpec, build_model, float_input, graph_bytes, op_counts
from tests.graph_passes.test_insert_sws import inserted, sws_feeds, two_grids

FLOAT = ir.TensorType(ir.DataType.FLOAT)


def lowered() -> ir.Model:
    model = inserted(two_grids())
    LowerFunctions()(model)
    return model


def interface(model: ir.Model) -> list[tuple[str | None, str, str]]:
    values = (*model.graph.inputs, *model.graph.outputs)
    return [(value.name, str(value.dtype), str(value.shape)) for value in values]


def graph_of(*nodes: ir.Node, outputs: list[ir.Value], x: ir.Value) -> ir.Model:
    """A graph from x [2, 3] to `outputs`."""
    for number, node in enumerate(nodes):
        node.name = node.name or f"node_{number}"
        for output in node.outputs:
            output.name = output.name or f"value_{number}"
    for value in outputs:
        value.type, value.shape = FLOAT, ir.Shape([2, 3])
    graph = ir.Graph([x], outputs, nodes=nodes, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=11)


def test_remaining_nodes() -> None:
    model = lowered()
    assert CleanGraph()(model).modified
    counts = op_counts(model)
    # Of the plain attention nodes only the cross-attention is used.
    assert counts["Attention"] == 4
    assert "Constant" not in counts
    assert "Identity" not in counts
    # One schedule a graph: sites share what depends on sigma alone.
    assert counts["Log"] == 1
    assert all(node.outputs[0].uses() or node.outputs[0].is_graph_output() for node in model.graph)


def test_results_and_interface_do_not_change(run_onnx: RunOnnx) -> None:
    model = lowered()
    values, before = sws_feeds(model), interface(model)
    expected = run_onnx(model, values)
    CleanGraph()(model)
    assert interface(model) == before
    found = run_onnx(model, values)
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 1e-6 * np.abs(value).max(), name


def test_a_second_run_changes_nothing() -> None:
    model = lowered()
    CleanGraph()(model)
    before = graph_bytes(model)
    assert not CleanGraph()(model).modified
    assert graph_bytes(model) == before


def test_equal_constants_are_one(run_onnx: RunOnnx) -> None:
    """Those that differ at their end only are kept, and so are those of another shape."""
    array = np.arange(100, dtype=np.float32)
    other_end = array.copy()
    other_end[-1] = 5
    x = ir.Value(name="x", type=FLOAT, shape=ir.Shape([100]))
    value, nodes, constants = x, [], []
    for number, data in enumerate((array, other_end, array.copy(), array.reshape(1, 100))):
        tensor = ir.tensor(data, name=f"c{number}")
        constant = ir.Value(name=tensor.name, type=FLOAT, shape=ir.Shape(data.shape), const_value=tensor)
        constants.append(constant)
        nodes.append(ir.node("Add", [value, constant], name=f"add{number}"))
        value = nodes[-1].outputs[0]
        value.name = f"sum{number}"
    value.type, value.shape = FLOAT, ir.Shape([1, 100])
    graph = ir.Graph([x], [value], nodes=nodes, initializers=constants, opset_imports={"": 23}, name="g")
    model = ir.Model(graph, ir_version=11)
    feeds = {"x": array}
    (expected,) = run_onnx(model, feeds).values()
    assert CleanGraph()(model).modified
    assert list(model.graph.initializers) == ["c0", "c1", "c3"]
    (found,) = run_onnx(model, feeds).values()
    np.testing.assert_array_equal(found, expected)


def test_metadata_of_the_exporter_is_removed() -> None:
    model = build_model([SiteSpec()])
    secret = "/home/somebody/unet.py, line 7"
    model.graph.doc_string = model.doc_string = secret
    model.graph.metadata_props["trace"] = secret
    model.metadata_props["pkg.torch.export.ExportedProgram.range_constraints"] = secret
    model.metadata_props["mine"] = "stays"
    for node in model.graph:
        node.doc_string = secret
        node.metadata_props["pkg.torch.onnx.stack_trace"] = secret
        node.outputs[0].metadata_props["trace"] = secret
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.doc_string = secret
        value.metadata_props["trace"] = secret
    assert secret.encode() in graph_bytes(model)
    CleanGraph()(model)
    assert secret.encode() not in graph_bytes(model)
    assert model.metadata_props == {"mine": "stays"}


def test_equal_outputs_stay_two_outputs(run_onnx: RunOnnx) -> None:
    x = float_input("x", [2, 3])
    first, second = ir.node("Neg", [x]), ir.node("Neg", [x])
    first.outputs[0].name, second.outputs[0].name = "a", "b"
    model = graph_of(first, second, outputs=[first.outputs[0], second.outputs[0]], x=x)
    CleanGraph()(model)
    assert [value.name for value in model.graph.outputs] == ["a", "b"]
    results = run_onnx(model, {"x": np.ones((2, 3), np.float32)})
    assert (results["a"] == -1).all()
    assert (results["b"] == -1).all()


def test_an_input_that_is_also_an_output_is_kept(run_onnx: RunOnnx) -> None:
    x = float_input("x", [2, 3])
    copy = ir.node("Identity", [x])
    copy.outputs[0].name = "y"
    model = graph_of(copy, outputs=[copy.outputs[0]], x=x)
    CleanGraph()(model)
    assert op_counts(model) == {"Identity": 1}
    results = run_onnx(model, {"x": np.ones((2, 3), np.float32)})
    assert (results["y"] == 1).all()


@pytest.mark.parametrize(("op_type", "left"), [("RandomNormalLike", 2), ("Neg", 1)])
def test_only_equal_nodes_are_shared(op_type: str, left: int) -> None:
    x = float_input("x", [2, 3])
    first, second = ir.node(op_type, [x]), ir.node(op_type, [x])
    total = ir.node("Add", [first.outputs[0], second.outputs[0]])
    model = graph_of(first, second, total, outputs=[total.outputs[0]], x=x)
    CleanGraph()(model)
    assert op_counts(model) == {op_type: left, "Add": 1}


@pytest.mark.parametrize("same", [True, False])
def test_only_equal_constants_are_shared(run_onnx: RunOnnx, same: bool) -> None:
    x = float_input("x", [2, 3])
    constants = [
        ir.node("Constant", [], {"value": ir.tensor(np.array(value, np.float32))})
        for value in (2.0, 2.0 if same else 3.0)
    ]
    product = ir.node("Mul", [x, constants[0].outputs[0]])
    total = ir.node("Add", [product.outputs[0], constants[1].outputs[0]])
    model = graph_of(*constants, product, total, outputs=[total.outputs[0]], x=x)
    CleanGraph()(model)
    assert len(model.graph.initializers) == (1 if same else 2)
    results = run_onnx(model, {"x": np.ones((2, 3), np.float32)})
    assert (results[str(model.graph.outputs[0].name)] == (4 if same else 5)).all()


def test_used_nodes_of_a_plain_graph_are_kept() -> None:
    model = build_model([SiteSpec()])
    CleanGraph()(model)
    live = op_counts(model)
    assert live == {
        "AveragePool": 1,
        "Reshape": 5,
        "Transpose": 5,
        "MatMul": 4,
        "Attention": 1,
        "Add": 1,
        "Concat": 1,
    }

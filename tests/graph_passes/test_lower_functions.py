"""SWS functions are inlined, except those for which the target has plugins."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import PostconditionError

from graph_passes.errors import GraphError
from graph_passes.lower_functions import LowerFunctions
from graph_passes.parameters import SwsParameters
from graph_passes.plain_graph import require_plain
from graph_passes.target import PLUGIN_OPERATORS
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import SiteSpec, build_model, feeds, graph_bytes, op_counts
from tests.graph_passes.test_insert_sws import inserted, sws_feeds, two_grids


def _with_node(op_type: str, domain: str = "") -> ir.Model:
    model = build_model([SiteSpec()])
    node = ir.node(op_type, [model.graph.inputs[0]], domain=domain, name="the_node")
    model.graph.append(node)
    return model


def test_no_operator_of_the_domain_remains() -> None:
    model = inserted(two_grids())
    assert LowerFunctions()(model).modified
    assert {node.domain for node in model.graph} == {""}
    assert len(model.functions) == 0
    assert model.graph.opset_imports == {"": 23}
    counts = op_counts(model)
    # Four of the plain graph and one each in the three sites with SWS.
    assert counts["Attention"] == 7
    assert {"Loop", "If", "Scan"}.isdisjoint(counts)


def test_kept_operators_keep_their_functions() -> None:
    model = inserted(two_grids())
    LowerFunctions(PLUGIN_OPERATORS)(model)
    counts = op_counts(model)
    assert {name: counts[name] for name in counts if name.startswith("sws.")} == {
        "sws.BandedTransport": 3,
        "sws.KeyGuard": 3,
    }
    assert {name for _, name, _ in model.functions} == PLUGIN_OPERATORS
    assert model.graph.opset_imports == {"": 23, "sws": 1}


def test_kept_operators_have_the_attributes_of_their_plugins() -> None:
    """A plugin does not read the body, which contains these constants."""
    model = inserted(two_grids(), parameters=SwsParameters(key_cap=0.25, bisection_steps=5))
    LowerFunctions(PLUGIN_OPERATORS)(model)
    guards = [node for node in model.graph if node.op_type == "KeyGuard"]
    transports = [node for node in model.graph if node.op_type == "BandedTransport"]
    assert len(guards) == len(transports) == 3
    assert {node.attributes.get_float("key_cap") for node in guards} == {0.25}
    assert {node.attributes.get_int("bisection_steps") for node in guards} == {5}
    assert {node.attributes.get_int("radius") for node in transports} == {8}
    # Keys and values are not concatenated for the plugin.
    assert {node.attributes.get_int("tensors") for node in transports} == {2}
    assert {(len(node.inputs), len(node.outputs)) for node in transports} == {(3, 2)}


@pytest.mark.parametrize("kept", [frozenset[str](), PLUGIN_OPERATORS], ids=["all", "plugins"])
def test_results_do_not_change(run_onnx: RunOnnx, kept: frozenset[str]) -> None:
    model = inserted(two_grids())
    values = sws_feeds(model)
    expected = run_onnx(model, values)
    LowerFunctions(kept)(model)
    found = run_onnx(model, values)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 1e-6 * np.abs(value).max(), name


def test_functions_of_other_domains_do_not_change(run_onnx: RunOnnx) -> None:
    model = build_model([SiteSpec()])
    x = ir.Value(name="x")
    double = ir.node("Add", [x, x])
    function_graph = ir.Graph([x], double.outputs, nodes=[double], opset_imports={"": 23})
    function = ir.Function("mine", "Double", graph=function_graph, attributes=[])
    model.functions[function.identifier()] = function
    model.graph.opset_imports["mine"] = 1
    call = ir.node("Double", [model.graph.outputs[0]], domain="mine", name="call")
    call.outputs[0].name, call.outputs[0].type = "doubled", ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(call)
    model.graph.outputs.append(call.outputs[0])

    assert not LowerFunctions()(model).modified
    assert op_counts(model)["mine.Double"] == 1
    results = run_onnx(model, feeds())
    assert (results["doubled"] == 2 * results["out_sample"]).all()


@pytest.mark.parametrize("kept", [frozenset[str](), PLUGIN_OPERATORS], ids=["all", "plugins"])
def test_a_second_run_changes_nothing(kept: frozenset[str]) -> None:
    model = inserted(two_grids())
    LowerFunctions(kept)(model)
    before = graph_bytes(model)
    assert not LowerFunctions(kept)(model).modified
    assert graph_bytes(model) == before


@pytest.mark.parametrize("op_type", ["Loop", "Scan"])
def test_loops_violate_the_postcondition(op_type: str) -> None:
    with pytest.raises(PostconditionError, match=f"node the_node: a function was lowered to a {op_type}"):
        LowerFunctions()(_with_node(op_type))


def test_a_call_without_a_function_violates_the_postcondition_unless_kept() -> None:
    model = _with_node("KeyGuard", "sws")
    LowerFunctions(PLUGIN_OPERATORS)(model)
    with pytest.raises(PostconditionError, match=r"node the_node: sws\.KeyGuard is left after lowering"):
        LowerFunctions()(model)


def test_a_plain_graph_with_a_loop_in_a_subgraph_is_refused() -> None:
    outer = ir.node("SequenceMap", [], name="outer")
    inner = ir.Graph([], [], nodes=[ir.node("Loop", [], name="hidden")])
    outer.attributes["body"] = ir.AttrGraph("body", inner)
    model = build_model([SiteSpec()])
    model.graph.append(outer)
    with pytest.raises(GraphError, match="node hidden: the graph has a Loop"):
        require_plain(model)


def test_operators_of_other_domains_are_allowed() -> None:
    for model in (_with_node("Loop", "somebody.else"), _with_node("Relu")):
        require_plain(model)
        LowerFunctions()(model)


def test_branches_are_allowed() -> None:
    require_plain(_with_node("If"))
    LowerFunctions().ensures(_with_node("If"))

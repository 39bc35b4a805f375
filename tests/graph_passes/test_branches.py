"""`If` nodes of the fused guard in a whole graph, after each pass."""

import collections
import functools

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graph_passes.clean_graph import CleanGraph
from graph_passes.lower_functions import LowerFunctions
from graph_passes.parameters import SwsParameters
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import feeds, graph_bytes
from tests.graph_passes.test_insert_sws import inserted, sws_feeds, two_grids

# Each step of the search adds branches of the same nodes.
PARAMETERS = SwsParameters(bisection_steps=2)


def with_branches(branches: bool = True) -> ir.Model:
    """A graph with the fused guard, or with the literal one, which has no branches."""
    form = "fused" if branches else "literal"
    return inserted(two_grids(), form=form, target="onnxruntime", parameters=PARAMETERS)


def cleaned(model: ir.Model) -> ir.Model:
    LowerFunctions()(model)
    CleanGraph()(model)
    return model


@functools.cache
def finished(branches: bool = True) -> ir.Model:
    """A lowered and cleaned model, which tests must not change."""
    return cleaned(with_branches(branches))


def subgraphs(model: ir.Model) -> list[ir.Graph]:
    return [graph for graph in model.graphs() if graph is not model.graph]


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 2e-6 * np.abs(value).max(), name


@pytest.mark.parametrize("intensity", [1.0, 0.0])
def test_branches_do_not_change_results(run_onnx: RunOnnx, intensity: float) -> None:
    branchless, model = finished(branches=False), finished()
    values = sws_feeds(model, intensity=intensity)
    assert_close(run_onnx(model, values), run_onnx(branchless, values))


def test_intensity_zero_equals_the_plain_graph_bit_for_bit(run_onnx: RunOnnx) -> None:
    plain = two_grids()
    CleanGraph()(plain)
    model = finished()
    expected = run_onnx(plain, feeds())["out_sample"]
    values = sws_feeds(model, intensity=0.0)
    assert (run_onnx(model, values)["out_sample"] == expected).all()
    values["intensity"][1] = 1.0
    beside = run_onnx(model, values)["out_sample"]
    assert (beside[0] == expected[0]).all()
    assert np.abs(beside[1] - expected[1]).max() > 1e-4


def test_lowering_and_cleaning_do_not_change_results(run_onnx: RunOnnx) -> None:
    model = with_branches()
    values = sws_feeds(model)
    expected = run_onnx(model, values)
    LowerFunctions()(model)
    assert_close(run_onnx(model, values), expected)
    CleanGraph()(model)
    assert_close(run_onnx(model, values), expected)


def test_names_are_unique() -> None:
    model = finished()
    names = [value.name for node in model.graph.all_nodes() for value in node.outputs]
    names += [value.name for value in (*model.graph.inputs, *model.graph.initializers.values())]
    assert max(collections.Counter(names).values()) == 1


def test_constants_of_branches_are_shared_with_the_graph() -> None:
    model = finished()
    assert len(subgraphs(model)) > 20
    assert all(not graph.initializers for graph in subgraphs(model))
    assert all(node.op_type != "Constant" for node in model.graph.all_nodes())
    contents = [
        (str(tensor.dtype), tensor.numpy().tobytes(), tuple(tensor.shape.numpy()))
        for value in model.graph.initializers.values()
        if (tensor := value.const_value) is not None
    ]
    assert max(collections.Counter(contents).values()) == 1


def test_values_used_by_branches_are_kept_and_unused_ones_removed() -> None:
    model = finished()
    graphs = set(model.graphs())
    for node in model.graph.all_nodes():
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            assert producer is None or producer.graph in graphs
        if node.op_type != "If":
            assert any(value.uses() or value.is_graph_output() for value in node.outputs), node


def test_metadata_in_branches_is_cleared() -> None:
    model = with_branches()
    LowerFunctions()(model)
    (first, *_) = subgraphs(model)
    first[0].doc_string = first[0].outputs[0].doc_string = "/home/somebody"
    CleanGraph()(model)
    assert b"somebody" not in graph_bytes(model)


def test_a_second_run_changes_nothing() -> None:
    model = finished()
    before = graph_bytes(model)
    assert not CleanGraph()(model).modified
    assert not LowerFunctions()(model).modified
    assert graph_bytes(model) == before


def test_a_serialized_copy_is_equal(run_onnx: RunOnnx) -> None:
    model = finished()
    copy = ir.from_proto(onnx.ModelProto.FromString(graph_bytes(model)))
    assert graph_bytes(copy) == graph_bytes(model)
    values = sws_feeds(model)
    assert_close(run_onnx(copy, values), run_onnx(model, values))


def test_a_float32_graph_is_valid_onnx() -> None:
    onnx.checker.check_model(ir.to_proto(finished()), full_check=True)

"""Nodes that depend on sizes alone are folded; weights are not read."""

import functools

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.clean_graph import CleanGraph
from graph_passes.fold_constants import FoldConstants
from graph_passes.lower_functions import LowerFunctions
from graph_passes.set_static_shapes import SetStaticShapes
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import (
    FLOAT,
    SiteSpec,
    build_model,
    float_input,
    graph_bytes,
    op_counts,
    site_name,
)
from tests.graph_passes.test_insert_sws import inserted, sws_feeds, two_grids

SIZES = {"height": 8, "width": 12, "tokens": 5}
ON_SIZES = {"Shape", "Range", "Expand", "Squeeze", "ReduceProd", "Min"}


def lowered(sizes: dict[str, int]) -> ir.Model:
    model = two_grids()
    inserted(model)
    SetStaticShapes(sizes)(model)
    LowerFunctions()(model)
    return model


@functools.cache
def folded(**sizes: int) -> ir.Model:
    """A model that tests must not change."""
    model = lowered(sizes)
    assert FoldConstants()(model).modified
    CleanGraph()(model)
    return model


@pytest.mark.parametrize("sizes", [SIZES, SIZES | {"batch": 2}])
def test_remaining_nodes(sizes: dict[str, int]) -> None:
    """No node reads a size, whether the batch is static or not."""
    counts = op_counts(folded(**sizes))
    assert not ON_SIZES & counts.keys()
    # Of each grid: two rounds after the blend, whose first diffusion is of Sinkhorn's factors and constant,
    # what gathers their result, and two rounds of the momentum. Nothing of Sinkhorn.
    assert counts["Conv"] == 2 * (3 + 1 + 2)
    assert counts["ConvTranspose"] == 2 * 2


def test_the_transports_of_the_scales_are_constants() -> None:
    model = folded(**SIZES)
    blends = [
        node.inputs[1].const_value
        for node in model.graph
        if node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].is_initializer()
        if [before.op_type for before in node.predecessors()] == ["Mul"]
    ]
    # A row for each offset up to (0, 0) that a scale has: with all 145 offsets of each it would be 435 rows.
    rows = 7 + 21 + 73
    assert sorted(tuple(tensor.shape.numpy()) for tensor in blends if tensor is not None) == [
        (1, rows, 4 * 6),
        (1, rows, 8 * 12),
    ]


def test_results_do_not_change(run_onnx: RunOnnx) -> None:
    plain, model = lowered({}), folded(**SIZES)
    values = sws_feeds(plain, height=8, width=12)
    state = np.random.default_rng(3).random((2, 145, 8, 12), dtype=np.float32) / 145
    values["sws_state_d1"] = state * (run_onnx(plain, values)["sws_state_d1_out"] > 0)
    expected, found = run_onnx(plain, values), run_onnx(model, values)
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 2e-6 * np.abs(value).max(), name
    still = run_onnx(plain, values | {"intensity": np.zeros_like(values["intensity"])})
    assert np.abs(still["out_sample"] - expected["out_sample"]).max() > 1e-4


def test_a_second_run_changes_nothing() -> None:
    model = folded(**SIZES)
    before = graph_bytes(model)
    assert not FoldConstants()(model).modified
    assert graph_bytes(model) == before


def test_dynamic_sizes_are_not_folded() -> None:
    """The number of tiles of a grid with dynamic width is computed at run time."""
    counts = op_counts(folded(height=8, tokens=5))
    assert {"Shape", "Range"} <= counts.keys()


def weighted(weight: np.ndarray, op_type: str) -> ir.Model:
    """x times a weight, after a node whose only input is the weight."""
    x = float_input("x", [2, 6])
    tensor = ir.tensor(weight, name="weight")
    held = ir.Value(name="weight", type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    changed = ir.node(op_type, [held])
    changed.outputs[0].name = "changed"
    cast = ir.node("CastLike", [changed.outputs[0], x])
    cast.outputs[0].name = "cast"
    product = ir.node("MatMul", [x, cast.outputs[0]])
    product.outputs[0].name, product.outputs[0].type = "y", ir.TensorType(FLOAT)
    graph = ir.Graph(
        [x],
        product.outputs,
        nodes=[changed, cast, product],
        initializers=[held],
        opset_imports={"": 23},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


def test_weights_are_not_read() -> None:
    class Unread(ir.LazyTensor):
        def _evaluate(self) -> ir.TensorProtocol:
            raise AssertionError("a weight was read")

    model = weighted(np.ones((6, 6), np.float32), "Transpose")
    held = model.graph.initializers["weight"]
    held.const_value = Unread(lambda: ir.tensor([0.0]), dtype=FLOAT, shape=ir.Shape([6, 6]), name="weight")
    FoldConstants()(model)
    assert op_counts(model)["Transpose"] == 1
    assert held.const_value is model.graph.initializers["weight"].const_value


def test_integers_are_folded(run_onnx: RunOnnx) -> None:
    model = weighted(np.arange(36).reshape(6, 6), "Transpose")
    values = {"x": np.ones((2, 6), np.float32)}
    expected = run_onnx(model, values)["y"]
    assert FoldConstants()(model).modified
    assert "Transpose" not in op_counts(model)
    np.testing.assert_array_equal(run_onnx(model, values)["y"], expected)


def test_a_plain_graph_keeps_its_nodes() -> None:
    model = build_model([SiteSpec(), SiteSpec(name=site_name("mid_block"))])
    before = op_counts(model)
    FoldConstants()(model)
    assert op_counts(model) == before

"""Attention nodes of the fused guard are decomposed for a runtime that cannot build them."""

import numpy as np
import onnx_ir as ir

from graph_passes.clean_graph import CleanGraph
from graph_passes.decompose_guard_attention import DecomposeGuardAttention
from graph_passes.lower_functions import LowerFunctions
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import op_counts
from tests.graph_passes.test_insert_sws import inserted, sws_feeds, two_grids


def fused() -> ir.Model:
    return inserted(two_grids(), form="fused")


def guard_ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.functions["sws", "KeyGuard", ""]]


def test_only_the_guard_is_decomposed() -> None:
    model = fused()
    attentions = guard_ops(model).count("Attention")
    assert attentions == 4
    assert DecomposeGuardAttention()(model).modified
    ops = guard_ops(model)
    assert (ops.count("Attention"), ops.count("Einsum"), ops.count("Softmax")) == (0, 4, 4)
    sites = [node.op_type for node in model.functions["sws", "Attention", ""]]
    assert sites.count("Attention") == 1
    LowerFunctions()(model)
    # Four of the plain graph and one each in the three sites with SWS.
    assert op_counts(model)["Attention"] == 7


def test_results_do_not_change(run_onnx: RunOnnx) -> None:
    expected, found = fused(), fused()
    DecomposeGuardAttention()(found)
    for model in (expected, found):
        LowerFunctions()(model)
        CleanGraph()(model)
    feeds = sws_feeds(expected)
    before, after = run_onnx(expected, feeds), run_onnx(found, feeds)
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, rtol=1e-5, atol=1e-6)
    still = run_onnx(expected, feeds | {"intensity": np.zeros_like(feeds["intensity"])})
    assert np.abs(still["out_sample"] - before["out_sample"]).max() > 1e-4


def test_the_literal_guard_and_a_plain_graph_do_not_change() -> None:
    assert not DecomposeGuardAttention()(inserted(two_grids())).modified
    assert not DecomposeGuardAttention()(two_grids()).modified


def test_a_second_run_changes_nothing() -> None:
    model = fused()
    DecomposeGuardAttention()(model)
    ops = guard_ops(model)
    assert not DecomposeGuardAttention()(model).modified
    assert guard_ops(model) == ops

"""The attentions of site metrics are spelled out for a runtime that cannot build them."""

import numpy as np
import onnx_ir as ir

from graph_passes.clean_graph import CleanGraph
from graph_passes.decompose_metrics_attention import DecomposeMetricsAttention
from graph_passes.lower_functions import LowerFunctions
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import op_counts
from tests.graph_passes.test_insert_sws import inserted, sws_feeds, two_grids


def with_metrics() -> ir.Model:
    return inserted(two_grids(), form="fused", target="tensorrt-rtx", debug_outputs=True)


def metrics_ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.functions["sws", "SiteMetrics", ""]]


def test_the_metrics_hold_no_attention_and_the_sites_keep_theirs() -> None:
    model = with_metrics()
    assert metrics_ops(model).count("Attention") == 4
    assert DecomposeMetricsAttention()(model).modified
    ops = metrics_ops(model)
    assert (ops.count("Attention"), ops.count("Einsum"), ops.count("Softmax")) == (0, 4, 4)
    sites = [node.op_type for node in model.functions["sws", "Attention", ""]]
    assert sites.count("Attention") == 1
    LowerFunctions()(model)
    # Four of the plain graph and one each in the three sites with SWS.
    assert op_counts(model)["Attention"] == 7


def test_the_numbers_stay_the_same(run_onnx: RunOnnx) -> None:
    expected, found = with_metrics(), with_metrics()
    DecomposeMetricsAttention()(found)
    for model in (expected, found):
        LowerFunctions()(model)
        CleanGraph()(model)
    feeds = sws_feeds(expected)
    before, after = run_onnx(expected, feeds), run_onnx(found, feeds)
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, rtol=1e-4, atol=1e-5)
    assert before["sws_debug_entropy_mean"].min() > 0.1


def test_a_graph_without_metrics_is_left_alone() -> None:
    assert not DecomposeMetricsAttention()(inserted(two_grids(), form="fused")).modified
    assert not DecomposeMetricsAttention()(two_grids()).modified


def test_a_second_run_changes_nothing() -> None:
    model = with_metrics()
    DecomposeMetricsAttention()(model)
    ops = metrics_ops(model)
    assert not DecomposeMetricsAttention()(model).modified
    assert metrics_ops(model) == ops

"""Debug outputs of the sites: names, values, and no change of the other outputs."""

import numpy as np
import onnx_ir as ir

from graph_passes.clean_graph import CleanGraph
from graph_passes.debug_outputs import debug_order, debug_output_names
from graph_passes.decompose_metrics_attention import DecomposeMetricsAttention
from graph_passes.find_sites import find_sites
from graph_passes.lower_functions import LowerFunctions
from graph_passes.parameters import SwsParameters
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import graph_bytes, op_counts, site_name
from tests.graph_passes.test_insert_sws import inserted, sws_feeds, two_grids

PARAMETERS = SwsParameters()


def debugged() -> ir.Model:
    return inserted(two_grids(), form="fused", debug_outputs=True)


def lowered(model: ir.Model) -> ir.Model:
    LowerFunctions()(model)
    CleanGraph()(model)
    return model


def test_added_nodes_and_outputs() -> None:
    plain, model = inserted(two_grids()), debugged()
    # One Squeeze for each metric of a site.
    added = {"Concat": 2, "Split": 1, "Constant": 1, "Squeeze": 6, "Identity": 1}
    assert op_counts(model) == {**op_counts(plain), **added}
    assert "SiteMetrics" in [name for _, name, _ in model.functions]
    outputs = model.graph.outputs[len(plain.graph.outputs) :]
    assert [value.name for value in outputs] == list(debug_output_names())
    shapes = [[str(getattr(dim, "value", dim)) for dim in value.shape or ()] for value in outputs]
    assert shapes == [["batch", "3"]] * 6 + [["batch"]]
    assert {value.dtype for value in outputs} == {ir.DataType.FLOAT}


def test_columns_are_ordered_by_grid_and_site() -> None:
    names = [site.name for site in debug_order(find_sites(two_grids())[0])]
    assert names == [site_name("down_blocks.0"), site_name("up_blocks.1"), site_name("mid_block")]


def test_other_outputs_do_not_change(run_onnx: RunOnnx) -> None:
    model = inserted(two_grids(), form="fused")
    feeds = sws_feeds(model)
    expected, found = run_onnx(lowered(model), feeds), run_onnx(lowered(debugged()), feeds)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_without_the_option_there_are_none() -> None:
    model = inserted(two_grids(), form="fused")
    assert b"sws_debug" not in graph_bytes(model)
    assert b"SiteMetrics" not in graph_bytes(model)


def test_metrics_are_consistent(run_onnx: RunOnnx) -> None:
    model = lowered(debugged())
    feeds = sws_feeds(model, sigma=3.0)
    feeds["intensity"] = np.array([1.0, 0.0], np.float32)
    found = {
        name.removeprefix("sws_debug_"): values
        for name, values in run_onnx(model, feeds).items()
        if name.startswith("sws_debug_")
    }
    progress = 1 - np.log(3.0 / PARAMETERS.sigma_min) / np.log(PARAMETERS.sigma_max / PARAMETERS.sigma_min)
    cap = PARAMETERS.kl_slope * (1 - progress) + PARAMETERS.kl_floor
    np.testing.assert_allclose(found["kl_cap"], cap, rtol=1e-5)
    assert (found["entropy_min"] <= found["entropy_mean"]).all()
    assert (found["entropy_mean"] <= found["entropy_max"]).all()
    # 24 tokens on the latent's grid, 6 on half of it.
    assert (found["entropy_max"] <= np.log([24, 24, 6]) + 1e-5).all()
    assert (found["kl"] <= cap + 1e-5).all()
    with_prompt, without = 0, 1
    assert (found["alpha_k"][with_prompt] > 0.01).all()
    assert (found["a_v"][with_prompt] > 0.01).all()
    assert (found["kl"][with_prompt] > 1e-4).all()
    for name in ("alpha_k", "a_v", "kl"):
        assert np.abs(found[name][without]).max() < 1e-5


def test_decomposed_attention_gives_the_same_metrics(run_onnx: RunOnnx) -> None:
    plain, spelled_out = debugged(), debugged()
    assert DecomposeMetricsAttention()(spelled_out).modified
    body = [node.op_type for node in spelled_out.functions["sws", "SiteMetrics", ""]]
    assert (body.count("Attention"), body.count("Einsum")) == (0, 4)
    feeds = sws_feeds(plain)
    expected, found = run_onnx(lowered(plain), feeds), run_onnx(lowered(spelled_out), feeds)
    for name in debug_output_names():
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=2e-5)

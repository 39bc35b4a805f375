"""Sites become calls of the SWS functions, with one transport and one state a grid."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.errors import GraphError
from graph_passes.find_sites import find_sites
from graph_passes.insert_sws import BAND, InsertSws, StatePair, state_pair
from graph_passes.parameters import SwsParameters
from tests.conftest import RunOnnx, ShapesModel
from tests.graph_passes.small_models import (
    SiteSpec,
    build_model,
    feeds,
    float_input,
    graph_bytes,
    op_counts,
    site_name,
)

LEVELS = 2
SITES = [
    SiteSpec(),
    SiteSpec(name=site_name("down_blocks.0").replace("attn1", "attn2"), context=True),
    SiteSpec(name=site_name("mid_block"), factor=2),
    SiteSpec(name=site_name("up_blocks.1")),
]


def two_grids() -> ir.Model:
    """Two sites on the latent's grid, one on half of it, and a cross-attention."""
    return build_model(SITES, LEVELS)


def inserted(model: ir.Model, take: Callable[[str], bool] = lambda _: True) -> ir.Model:
    sites = [site for site in find_sites(model)[0] if take(site.name)]
    assert InsertSws(sites, SwsParameters())(model).modified
    return model


def sws_feeds(model: ir.Model, sigma: float = 3.0, intensity: float = 1.0, **sizes: int) -> dict[str, Any]:
    """Inputs of a model with SWS: zeros for its states."""
    values = feeds(**sizes)
    batch, _, height, width = values["sample"].shape
    values["sigma"] = np.full(batch, sigma, np.float32)
    values["intensity"] = np.full(batch, intensity, np.float32)
    for value in model.graph.inputs:
        assert value.name is not None
        if value.name.startswith("sws_state_d"):
            factor = int(value.name.removeprefix("sws_state_d"))
            values[value.name] = np.zeros((batch, BAND, height // factor, width // factor), np.float32)
    return values


def test_the_nodes_it_leaves() -> None:
    plain, model = two_grids(), inserted(two_grids())
    added = {"sws.Schedule": 1, "sws.Transport": 2, "sws.Attention": 3}
    assert op_counts(model) == {**op_counts(plain), **added}
    assert sorted(name for _, name, _ in model.functions) == [
        "Attention",
        "BandedTransport",
        "KeyGuard",
        "Schedule",
        "Transport",
    ]
    assert model.graph.opset_imports["sws"] == 1


def test_sites_of_one_grid_share_one_transport() -> None:
    model = inserted(two_grids())
    calls = {node.name: node for node in model.graph if node.domain == "sws"}
    fine, coarse = (calls[f"sws/transport_d{factor}"].outputs[0] for factor in (1, 2))
    assert calls["sws/" + site_name("down_blocks.0")].inputs[3] is fine
    assert calls["sws/" + site_name("up_blocks.1")].inputs[3] is fine
    assert calls["sws/" + site_name("mid_block")].inputs[3] is coarse


def test_the_interface_it_adds() -> None:
    model = inserted(two_grids())
    interface = {
        value.name: (value.dtype, [str(getattr(dim, "value", dim)) for dim in value.shape])
        for value in (*model.graph.inputs[2:], *model.graph.outputs[1:])
        if value.shape is not None
    }
    fine = (ir.DataType.FLOAT, ["batch", "145", "height", "width"])
    coarse = (ir.DataType.FLOAT, ["batch", "145", "height/2", "width/2"])
    assert interface == {
        "sigma": (ir.DataType.FLOAT, ["batch"]),
        "intensity": (ir.DataType.FLOAT, ["batch"]),
        "sws_state_d1": fine,
        "sws_state_d2": coarse,
        "sws_state_d1_out": fine,
        "sws_state_d2_out": coarse,
    }
    assert state_pair(4) == StatePair("sws_state_d4", "sws_state_d4_out", 4)


def test_intensity_zero_is_the_plain_graph(run_onnx: RunOnnx) -> None:
    expected = run_onnx(two_grids(), feeds())["out_sample"]
    model = inserted(two_grids())
    found = run_onnx(model, sws_feeds(model, intensity=0.0))["out_sample"]
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_each_site_changes_its_own_tokens_and_no_others(run_onnx: RunOnnx) -> None:
    expected = run_onnx(two_grids(), feeds())["out_sample"]
    model = inserted(two_grids())
    found = run_onnx(model, sws_feeds(model))["out_sample"]
    # 24 tokens a site on the latent's grid of 4 x 6, cross-attention among them, and 6 on half of it.
    changes = np.abs(found - expected).max(axis=(0, 2))
    down, cross, middle, up = np.split(changes, [24, 48, 54])
    assert (cross == 0).all()
    assert min(down.min(), middle.min(), up.min()) > 1e-4


def test_sites_that_are_not_given_keep_the_plain_attention(run_onnx: RunOnnx) -> None:
    expected = run_onnx(two_grids(), feeds())["out_sample"]
    model = inserted(two_grids(), take=lambda name: name.startswith("mid"))
    assert op_counts(model)["sws.Transport"] == 1
    assert [value.name for value in model.graph.outputs] == ["out_sample", "sws_state_d2_out"]
    found = run_onnx(model, sws_feeds(model))["out_sample"]
    same = (found == expected).all(axis=(0, 2))
    assert same.tolist() == [True] * 48 + [False] * 6 + [True] * 24


def test_state_out_is_a_transport_whose_rows_are_shares(run_onnx: RunOnnx) -> None:
    model = inserted(two_grids())
    results = run_onnx(model, sws_feeds(model, batch=3))
    assert results["sws_state_d1_out"].shape == (3, BAND, 4, 6)
    assert results["sws_state_d2_out"].shape == (3, BAND, 2, 3)
    for name in ("sws_state_d1_out", "sws_state_d2_out"):
        assert results[name].min() >= 0
        assert np.allclose(results[name].sum(axis=1), 1, atol=0.05)


def test_no_sites_no_change() -> None:
    model = two_grids()
    before = graph_bytes(model)
    assert not InsertSws([], SwsParameters())(model).modified
    assert graph_bytes(model) == before


def test_a_graph_that_has_sws_is_refused_and_left_alone() -> None:
    model = inserted(two_grids())
    before = graph_bytes(model)
    with pytest.raises(GraphError, match="has SWS already"):
        InsertSws(find_sites(model)[0], SwsParameters())(model)
    assert graph_bytes(model) == before


def test_an_output_of_unknown_type_is_refused() -> None:
    model = two_grids()
    model.graph.outputs[0].type = None
    with pytest.raises(GraphError, match="dtype of the graph's output is unknown"):
        InsertSws(find_sites(model)[0], SwsParameters())(model)


def test_a_graph_with_an_input_called_sigma_is_refused() -> None:
    model = two_grids()
    model.graph.inputs.append(float_input("sigma", ["batch"]))
    with pytest.raises(GraphError, match="sigma"):
        InsertSws(find_sites(model)[0], SwsParameters())(model)


def test_the_example_gets_one_state_a_grid(shapes_model: ShapesModel) -> None:
    model = inserted(shapes_model("fp16"))
    counts = op_counts(model)
    assert {name: counts[name] for name in counts if name.startswith("sws.")} == {
        "sws.Schedule": 1,
        "sws.Transport": 2,
        "sws.Attention": 7,
    }
    assert [(value.name, value.dtype) for value in model.graph.outputs] == [
        ("out_sample", ir.DataType.FLOAT16),
        ("sws_state_d2_out", ir.DataType.FLOAT),
        ("sws_state_d4_out", ir.DataType.FLOAT),
    ]

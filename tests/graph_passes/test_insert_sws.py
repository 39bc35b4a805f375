"""Sites become calls of the SWS functions, with one transport and one state per grid."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.errors import GraphError
from graph_passes.find_sites import find_sites
from graph_passes.grids import Grid
from graph_passes.guard import GuardForm, GuardOptions
from graph_passes.insert_sws import BAND, InsertSws, StatePair, state_pair
from graph_passes.parameters import SwsParameters
from graph_passes.target import TARGETS
from tests.conftest import RunOnnx
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


CROSS = SITES[1].name


def two_grids() -> ir.Model:
    """Two sites on the latent's grid, one on half of it, and a cross-attention."""
    return build_model(SITES, LEVELS)


def inserted(
    model: ir.Model,
    take: Callable[[str], bool] = lambda _: True,
    *,
    cross: bool = False,
    form: GuardForm = "literal",
    rows: Fraction | str = Fraction(1),
    target: str = "tensorrt",
    parameters: SwsParameters | None = None,
    debug_outputs: bool = False,
) -> ir.Model:
    """`model` with SWS at the sites for which `take` is true."""
    sites = [site for site in find_sites(model, cross_attention=cross)[0] if take(site.name)]
    guard = GuardOptions.parse(form, str(rows))
    insertion = InsertSws(
        sites, parameters or SwsParameters(), TARGETS[target], guard, debug_outputs=debug_outputs
    )
    assert insertion(model).modified
    return model


def sws_feeds(model: ir.Model, sigma: float = 3.0, intensity: float = 1.0, **sizes: int) -> dict[str, Any]:
    """Inputs of a model with SWS: zeros for its states."""
    values = feeds(**sizes)
    batch, _, height, width = values["sample"].shape
    values["sigma"] = np.full(batch, sigma, np.float32)
    values["intensity"] = np.full(batch, intensity, np.float32)
    tokens = values["encoder_hidden_states"].shape[1]
    for value in model.graph.inputs:
        assert value.name is not None
        if value.name == "sws_state_text":
            values[value.name] = np.zeros((batch, BAND, 1, tokens), np.float32)
        if value.name.startswith("sws_state_d"):
            factor = int(value.name.removeprefix("sws_state_d"))
            values[value.name] = np.zeros((batch, BAND, height // factor, width // factor), np.float32)
    return values


def test_remaining_nodes() -> None:
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


def test_models_do_not_share_functions() -> None:
    """What a pass changes in the functions of one model is not in the next."""
    model = inserted(two_grids())
    before = graph_bytes(model)
    for function in model.functions.values():
        for node in function:
            node.op_type = "Changed"
    assert graph_bytes(inserted(two_grids())) == before


def test_sites_of_one_grid_share_one_transport() -> None:
    model = inserted(two_grids())
    calls = {node.name: node for node in model.graph if node.domain == "sws"}
    fine, coarse = (calls[f"sws/transport_d{factor}"].outputs[0] for factor in (1, 2))
    assert calls["sws/" + site_name("down_blocks.0")].inputs[3] is fine
    assert calls["sws/" + site_name("up_blocks.1")].inputs[3] is fine
    assert calls["sws/" + site_name("mid_block")].inputs[3] is coarse


def test_added_inputs_and_outputs() -> None:
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
    assert state_pair(Grid(4)) == StatePair("sws_state_d4", "sws_state_d4_out", Grid(4))


def test_cross_attention_gets_a_transport_of_the_text() -> None:
    plain, model = two_grids(), inserted(two_grids(), cross=True)
    added = {"sws.Schedule": 1, "sws.Transport": 3, "sws.Attention": 3, "sws.CrossAttention": 1}
    assert op_counts(model) == {**op_counts(plain), **added}
    calls = {node.name: node for node in model.graph if node.domain == "sws"}
    assert calls[f"sws/{CROSS}"].op_type == "CrossAttention"
    assert calls[f"sws/{CROSS}"].inputs[3] is calls["sws/transport_text"].outputs[0]
    for value in (model.graph.inputs[-1], model.graph.outputs[-1]):
        assert value.shape is not None
        assert [str(getattr(dim, "value", dim)) for dim in value.shape] == ["batch", "145", "1", "tokens"]
    assert [value.name for value in model.graph.inputs][4:] == [
        "sws_state_d1",
        "sws_state_d2",
        "sws_state_text",
    ]


def test_a_static_text_length_gives_a_static_state() -> None:
    model = two_grids()
    model.graph.inputs[1].shape = ir.Shape(["batch", 77, 8])
    state = inserted(model, cross=True).graph.inputs[-1]
    assert state.shape == ir.Shape(["batch", BAND, 1, 77])


@pytest.mark.parametrize(("index", "name"), [(0, "sample"), (1, "encoder_hidden_states")])
def test_cross_attention_needs_the_inputs_shapes(index: int, name: str) -> None:
    model = two_grids()
    model.graph.inputs[index].shape = None
    with pytest.raises(GraphError, match=f"cross-attention needs an input '{name}' of rank"):
        inserted(model, cross=True, rows=Fraction(1, 4))


@pytest.mark.parametrize("rows", [Fraction(1), Fraction(1, 8)])
def test_cross_attention_changes_its_own_tokens_only(run_onnx: RunOnnx, rows: Fraction) -> None:
    expected = run_onnx(two_grids(), feeds())["out_sample"]
    model = inserted(two_grids(), take=lambda name: name == CROSS, cross=True, rows=rows)
    assert [value.name for value in model.graph.outputs] == ["out_sample", "sws_state_text_out"]
    found = run_onnx(model, sws_feeds(model))
    changes = np.abs(found["out_sample"] - expected).max(axis=(0, 2))
    assert (changes > 1e-4).tolist() == [False] * 24 + [True] * 24 + [False] * 30
    assert (changes[:24] == 0).all()
    assert (changes[48:] == 0).all()
    assert found["sws_state_text_out"].shape == (2, BAND, 1, 5)
    plain = run_onnx(model, sws_feeds(model, intensity=0.0))["out_sample"]
    assert np.array_equal(plain, expected)


def test_intensity_zero_is_the_plain_graph(run_onnx: RunOnnx) -> None:
    expected = run_onnx(two_grids(), feeds())["out_sample"]
    model = inserted(two_grids())
    found = run_onnx(model, sws_feeds(model, intensity=0.0))["out_sample"]
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_each_site_changes_its_own_tokens_only(run_onnx: RunOnnx) -> None:
    expected = run_onnx(two_grids(), feeds())["out_sample"]
    model = inserted(two_grids())
    found = run_onnx(model, sws_feeds(model))["out_sample"]
    # 24 tokens a site on the latent's grid of 4 x 6, cross-attention among them, and 6 on half of it.
    changes = np.abs(found - expected).max(axis=(0, 2))
    down, cross, middle, up = np.split(changes, [24, 48, 54])
    assert (cross == 0).all()
    assert min(down.min(), middle.min(), up.min()) > 1e-4


def test_unselected_sites_do_not_change(run_onnx: RunOnnx) -> None:
    expected = run_onnx(two_grids(), feeds())["out_sample"]
    model = inserted(two_grids(), take=lambda name: name.startswith("mid"))
    assert op_counts(model)["sws.Transport"] == 1
    assert [value.name for value in model.graph.outputs] == ["out_sample", "sws_state_d2_out"]
    found = run_onnx(model, sws_feeds(model))["out_sample"]
    same = (found == expected).all(axis=(0, 2))
    assert same.tolist() == [True] * 48 + [False] * 6 + [True] * 24


def test_the_next_state_is_a_transport_with_rows_of_sum_1(run_onnx: RunOnnx) -> None:
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
    assert not InsertSws([], SwsParameters(), TARGETS["tensorrt"], GuardOptions())(model).modified
    assert graph_bytes(model) == before


def test_a_graph_with_sws_is_refused_and_not_changed() -> None:
    model = inserted(two_grids())
    before = graph_bytes(model)
    with pytest.raises(GraphError, match="has SWS already"):
        inserted(model)
    assert graph_bytes(model) == before


def test_an_output_of_unknown_type_is_refused() -> None:
    model = two_grids()
    model.graph.outputs[0].type = None
    with pytest.raises(GraphError, match="dtype of the graph's output is unknown"):
        inserted(model)


def test_a_graph_with_an_input_called_sigma_is_refused() -> None:
    model = two_grids()
    model.graph.inputs.append(float_input("sigma", ["batch"]))
    with pytest.raises(GraphError, match="sigma"):
        inserted(model)

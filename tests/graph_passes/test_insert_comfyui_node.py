"""Cross-attention sites become function calls that pass the state from site to site."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F

from graph_passes.clean_graph import CleanGraph
from graph_passes.debug_outputs import debug_output_names
from graph_passes.errors import GraphError
from graph_passes.find_sites import find_sites
from graph_passes.insert_comfyui_node import InsertComfyUINode, basis_widths
from graph_passes.lower_functions import LowerFunctions
from graph_passes.parameters import SwsParameters
from sws_export.reference import comfyui_node_patch, comfyui_node_schedule, fresh_transport
from sws_export.reference.orthonormal_basis import orthonormal_basis
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import (
    CHANNELS,
    HEADS,
    SiteSpec,
    build_model,
    feeds,
    graph_bytes,
    op_counts,
    site_name,
)

LEVELS = 2
TOKENS = 5


def cross(path: str, **changes: Any) -> SiteSpec:
    name = site_name(path).replace("attn1", "attn2")
    return SiteSpec(**{"name": name, "context": True} | changes)


FIRST, SECOND, THIRD = cross("down_blocks.0"), cross("mid_block", factor=2), cross("up_blocks.1")


def two_grids(text_width: int = CHANNELS, **changes: Any) -> ir.Model:
    """A self-attention and three cross-attentions."""
    third = cross("up_blocks.1", **changes)
    return build_model([SiteSpec(), FIRST, SECOND, third], LEVELS, text_width)


def inserted(
    model: ir.Model,
    take: Callable[[str], bool] = lambda _: True,
    parameters: SwsParameters | None = None,
) -> ir.Model:
    sites = [s for s in find_sites(model, cross_attention=True)[0] if "attn2" in s.name and take(s.name)]
    bases = {widths: orthonormal_basis(*widths).numpy() for widths in basis_widths(sites)}
    assert InsertComfyUINode(sites, parameters or SwsParameters(), bases)(model).modified
    return model


def node_feeds(
    sigma: float = 3.0, intensity: float = 1.0, text_width: int = CHANNELS, **sizes: int
) -> dict[str, Any]:
    values = feeds(tokens=TOKENS, text_width=text_width, **sizes)
    batch = len(values["sample"])
    return values | {
        "sigma": np.full(batch, sigma, np.float32),
        "intensity": np.full(batch, intensity, np.float32),
        "sws_state_text": np.zeros((1, TOKENS, TOKENS), np.float32),
    }


def test_remaining_nodes() -> None:
    plain, model = two_grids(), inserted(two_grids())
    added = {"sws.ComfyUINodeSchedule": 1, "sws.ComfyUINodeTransport": 1, "sws.ComfyUINodeAttention": 3}
    assert op_counts(model) == {**op_counts(plain), **added}
    assert model.graph.opset_imports["sws"] == 1
    assert not any(name.startswith("sws/basis") for name in model.graph.initializers)


@pytest.mark.parametrize("text_width", [6, 12])
def test_sites_of_other_widths_share_a_basis_and_keys(text_width: int) -> None:
    model = inserted(two_grids(text_width))
    counts = op_counts(model)
    assert counts["sws.ComfyUINodeKeys"] == 1
    (basis,) = (value for name, value in model.graph.initializers.items() if name.startswith("sws/basis"))
    assert basis.dtype == ir.DataType.FLOAT
    wide, narrow = max(text_width, CHANNELS), min(text_width, CHANNELS)
    expected = orthonormal_basis(wide, narrow).numpy()
    assert basis.const_value is not None
    np.testing.assert_array_equal(
        basis.const_value.numpy(), expected if text_width > CHANNELS else expected.T
    )


def test_the_state_passes_in_graph_order() -> None:
    model = inserted(two_grids())
    calls = [node for node in model.graph if node.op_type == "ComfyUINodeAttention"]
    assert [call.name for call in calls] == [f"sws/{spec.name}" for spec in (FIRST, SECOND, THIRD)]
    states = {value.name: value for value in model.graph.inputs}
    assert calls[0].inputs[5] is states["sws_state_text"]
    assert [call.inputs[5] for call in calls[1:]] == [call.outputs[1] for call in calls[:-1]]
    assert calls[-1].outputs[1] is model.graph.outputs[-1]


def test_added_inputs_and_outputs() -> None:
    model = inserted(two_grids())
    interface = {
        value.name: (value.dtype, [getattr(dim, "value", dim) for dim in value.shape])
        for value in (*model.graph.inputs[2:], *model.graph.outputs[1:])
        if value.shape is not None
    }
    square = (ir.DataType.FLOAT, [1, "tokens", "tokens"])
    assert interface == {
        "sigma": (ir.DataType.FLOAT, ["batch"]),
        "intensity": (ir.DataType.FLOAT, ["batch"]),
        "sws_state_text": square,
        "sws_state_text_out": square,
    }


def test_a_static_text_length_gives_a_static_state() -> None:
    model = two_grids()
    model.graph.inputs[1].shape = ir.Shape(["batch", 77, CHANNELS])
    inserted(model)
    assert model.graph.inputs[-1].shape == ir.Shape([1, 77, 77])


@pytest.mark.parametrize("text_width", [6, CHANNELS, 12])
def test_at_sigma_max_it_is_the_plain_graph(run_onnx: RunOnnx, text_width: int) -> None:
    expected = run_onnx(two_grids(text_width), feeds(text_width=text_width))["out_sample"]
    found = run_onnx(inserted(two_grids(text_width)), node_feeds(sigma=25.0, text_width=text_width))
    assert np.abs(found["out_sample"] - expected).max() <= 1e-6 * np.abs(expected).max()
    assert (found["sws_state_text_out"] == 0).all()


def test_each_site_changes_its_own_tokens_only(run_onnx: RunOnnx) -> None:
    expected = run_onnx(two_grids(), feeds())["out_sample"]
    found = run_onnx(inserted(two_grids()), node_feeds())["out_sample"]
    # 24 tokens a site on the latent's grid of 4 x 6, and 6 on half of it.
    changes = np.abs(found - expected).max(axis=(0, 2))
    own, down, middle, up = np.split(changes, [24, 48, 54])
    assert (own == 0).all()
    assert min(down.min(), middle.min(), up.min()) > 1e-4


def test_unselected_sites_do_not_change(run_onnx: RunOnnx) -> None:
    expected = run_onnx(two_grids(), feeds())["out_sample"]
    model = inserted(two_grids(), take=lambda name: name.startswith("mid"))
    found = run_onnx(model, node_feeds())
    same = (found["out_sample"] == expected).all(axis=(0, 2))
    assert same.tolist() == [True] * 48 + [False] * 6 + [True] * 24


@pytest.mark.parametrize("text_width", [6, CHANNELS, 12])
def test_two_steps_of_the_first_site_equal_the_reference(run_onnx: RunOnnx, text_width: int) -> None:
    """SWS at one site only; the weights are read from the graph."""
    plain = two_grids(text_width)
    (site,) = (s for s in find_sites(plain, cross_attention=True)[0] if s.name == FIRST.name)
    weights = [
        torch.from_numpy(value.producer().inputs[1].const_value.numpy()).double()
        for value in (site.q, site.k, site.v)
    ]
    model = inserted(two_grids(text_width), take=lambda name: name == FIRST.name)
    # The result of the site before its output projection.
    y = next(node.outputs[0] for node in model.graph if node.op_type == "ComfyUINodeAttention")
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "t", CHANNELS])
    model.graph.outputs.append(y)
    kept, state = torch.zeros(TOKENS, TOKENS).double(), None
    for sigma in (3.0, 1.0):
        given = node_feeds(sigma, 0.8, text_width)
        found = run_onnx(model, given | ({} if state is None else {"sws_state_text": state}))
        state = found["sws_state_text_out"]
        hidden = torch.from_numpy(given["sample"]).double().flatten(2).transpose(1, 2)
        text = torch.from_numpy(given["encoder_hidden_states"]).double()
        now = comfyui_node_schedule(torch.tensor([sigma], dtype=torch.float64), SwsParameters())
        fresh = fresh_transport(TOKENS, now.u, SwsParameters())
        strength = torch.tensor([0.8], dtype=torch.float64)
        result = comfyui_node_patch(hidden, text, text, kept, fresh, now, strength, SwsParameters())
        kept = result.transport
        q, k, v = (
            (x @ weight).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for x, weight in zip((result.q, result.k, result.v), weights, strict=True)
        )
        expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        assert result.alpha_k > 0
        np.testing.assert_allclose(found[str(y.name)], expected.numpy(), atol=2e-5)
        np.testing.assert_allclose(state[0], kept.numpy(), rtol=1e-5, atol=1e-8)


def test_lowering_does_not_change_results_and_leaves_no_function(run_onnx: RunOnnx) -> None:
    expected = run_onnx(inserted(two_grids(12)), node_feeds(text_width=12))
    model = inserted(two_grids(12))
    LowerFunctions()(model)
    CleanGraph()(model)
    assert not any(node.domain == "sws" for node in model.graph)
    found = run_onnx(model, node_feeds(text_width=12))
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-7)
    before = graph_bytes(model)
    assert not LowerFunctions()(model).modified
    assert not CleanGraph()(model).modified
    assert graph_bytes(model) == before


def test_debug_outputs_do_not_change_other_outputs(run_onnx: RunOnnx) -> None:
    expected = run_onnx(inserted(two_grids(12)), node_feeds(text_width=12))
    model = two_grids(12)
    sites = [s for s in find_sites(model, cross_attention=True)[0] if "attn2" in s.name]
    bases = {widths: orthonormal_basis(*widths).numpy() for widths in basis_widths(sites)}
    InsertComfyUINode(sites, SwsParameters(), bases, debug_outputs=True)(model)
    found = run_onnx(model, node_feeds(text_width=12))
    for name, values in expected.items():
        np.testing.assert_array_equal(found.pop(name), values)
    assert tuple(found) == debug_output_names()
    assert {values.shape for values in found.values()} == {(2, 3), (2,)}
    u = comfyui_node_schedule(torch.tensor([3.0]), SwsParameters()).u
    np.testing.assert_allclose(found["sws_debug_kl_cap"], 0.08 * (1 - float(u)) + 0.01, rtol=1e-5)
    low, mean, high = (found[f"sws_debug_entropy_{which}"] for which in ("min", "mean", "max"))
    uncertainty = (mean - low) / (high - low)
    amplitude = uncertainty * 4 * float(u) * (1 - float(u))
    np.testing.assert_allclose(
        found["sws_debug_a_v"], 0.6 * amplitude * (0.5 + 0.5 * (1 - float(u))), rtol=1e-4
    )
    # No budget binds here.
    np.testing.assert_allclose(found["sws_debug_alpha_k"], 0.3 * amplitude * 127 / 128, rtol=1e-4)
    assert (found["sws_debug_kl"] > 0).all()


def test_no_sites_no_change() -> None:
    model = two_grids()
    before = graph_bytes(model)
    assert not InsertComfyUINode([], SwsParameters(), {})(model).modified
    assert graph_bytes(model) == before


def test_a_graph_with_sws_is_refused_and_not_changed() -> None:
    model = inserted(two_grids())
    before = graph_bytes(model)
    sites = find_sites(two_grids(), cross_attention=True)[0][1:]
    with pytest.raises(GraphError, match="has SWS already"):
        InsertComfyUINode(sites, SwsParameters(), {})(model)
    assert graph_bytes(model) == before


def test_missing_projections_are_named_and_the_graph_is_not_changed() -> None:
    model = two_grids(bias=True)
    before = graph_bytes(model)
    sites = [s for s in find_sites(model, cross_attention=True)[0] if "attn2" in s.name]
    with pytest.raises(GraphError, match=rf"^{THIRD.name}: .* queries .* without a bias, found Add"):
        InsertComfyUINode(sites, SwsParameters(), {})(model)
    assert graph_bytes(model) == before


def test_a_self_attention_is_refused() -> None:
    model = two_grids()
    with pytest.raises(
        GraphError, match=r"attn1: expected cross-attention to the text, found self-attention"
    ):
        InsertComfyUINode(find_sites(model)[0], SwsParameters(), {})(model)


def test_weights_of_unknown_shape_are_refused() -> None:
    model = two_grids()
    sites = [s for s in find_sites(model, cross_attention=True)[0] if "attn2" in s.name]
    sites[1].k.producer().inputs[1].shape = None
    with pytest.raises(GraphError, match=rf"^{SECOND.name}: .* keys .* shape None"):
        InsertComfyUINode(sites, SwsParameters(), {})(model)

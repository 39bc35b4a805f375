"""Attention sites, their grids, and the reasons for which other attention nodes are skipped."""

import math
from typing import Any

import pytest

from graph_passes.find_sites import find_sites
from graph_passes.grids import TEXT, Grid
from tests.graph_passes.small_models import (
    CHANNELS,
    HEADS,
    SiteSpec,
    build_model,
    graph_bytes,
    site_name,
)


def test_a_self_attention_site() -> None:
    model = build_model([SiteSpec(attributes=(("scale", 0.25),))])
    (site,), skipped = find_sites(model)
    assert skipped == []
    assert site.name == "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert (site.heads, site.scale, site.factor) == (HEADS, 0.25, 1)
    assert [value.producer().name.split(".")[-1] for value in (site.q, site.k, site.v)] == [
        "to_q/MatMul",
        "to_k/MatMul",
        "to_v/MatMul",
    ]
    assert site.y.producer().op_type == "Reshape"
    assert site.y.consumers()[0].name.endswith("to_out.0/MatMul")


@pytest.mark.parametrize("cast", [False, True])
def test_cross_attention_on_request(cast: bool) -> None:
    cross = site_name("down_blocks.0").replace("attn1", "attn2")
    model = build_model([SiteSpec(), SiteSpec(name=cross, context=True, cast_context=cast)], levels=2)
    (own, text), skipped = find_sites(model, cross_attention=True)
    assert skipped == []
    assert (own.name, own.factor, own.key_grid) == (site_name("down_blocks.0"), 1, Grid(1))
    assert (text.name, text.factor, text.key_grid) == (cross, 1, TEXT)
    assert find_sites(model)[0] == [own]


@pytest.mark.parametrize(
    "change", [{"image_prompt": True}, {"context_values": True}, {"context": True, "masked": True}]
)
def test_keys_that_are_not_the_text_are_skipped(change: dict[str, Any]) -> None:
    model = build_model([SiteSpec(**change)])
    assert find_sites(model, cross_attention=True) == find_sites(model)
    assert len(find_sites(model)[1]) == 1


def test_a_text_changed_by_another_node_is_not_the_text() -> None:
    model = build_model([SiteSpec(context=True, cast_context=True)])
    next(node for node in model.graph if node.op_type == "Cast").op_type = "Neg"
    _, (skipped,) = find_sites(model, cross_attention=True)
    assert skipped.reason.endswith("come from another tensor than encoder_hidden_states")


def test_scale_defaults_to_the_root_of_the_head_size() -> None:
    (site,), _ = find_sites(build_model([SiteSpec()]))
    assert site.scale == 1 / math.sqrt(CHANNELS // HEADS)


def test_projections_with_bias() -> None:
    (site,), _ = find_sites(build_model([SiteSpec(bias=True)]))
    assert site.q.producer().op_type == "Add"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"masked": True}, "it has a mask or a key cache"),
        ({"attributes": (("is_causal", 1),)}, "it is causal or caps its logits"),
        ({"attributes": (("softcap", 5.0),)}, "it is causal or caps its logits"),
        ({"context": True}, "cross-attention: keys and values come from the text"),
        (
            {"image_prompt": True},
            "cross-attention: keys and values come from another tensor than encoder_hidden_states",
        ),
        ({"context_values": True}, "its keys and values come from different tensors"),
        ({"projected": False}, "its queries, keys or values are not plain projections"),
        ({"split": (0, 2, 3, 1)}, "its heads are transposed in an unknown way"),
        ({"join": (0, 1, 2, 3)}, "its heads are joined in an unknown way"),
        ({"watched": True}, "its heads are not joined by Transpose and Reshape"),
        ({"typed": False}, "its shape is not known"),
        (
            {"kv_heads": 1},
            "its keys or values have other heads than its queries",
        ),
    ],
)
def test_a_near_miss_is_skipped_with_its_reason(change: dict[str, Any], reason: str) -> None:
    model = build_model([SiteSpec(**change), SiteSpec(name=site_name("mid_block"))])
    before = graph_bytes(model)
    sites, (skipped,) = find_sites(model)
    assert [site.name for site in sites] == [site_name("mid_block")]
    assert (skipped.name, skipped.reason) == (site_name("down_blocks.0"), reason)
    assert graph_bytes(model) == before


@pytest.mark.parametrize(
    "name", ["node_42", "text_model.encoder.layers.0.attn1", "down_blocks.0.attentions.0"]
)
def test_an_attention_without_a_module_path_is_skipped(name: str) -> None:
    sites, (skipped,) = find_sites(build_model([SiteSpec(name=name)]))
    assert sites == []
    assert skipped.name == f"{name}/Attention"
    assert skipped.reason == "its name does not contain the block of the UNet that it belongs to"


def test_an_attention_of_another_domain_is_ignored() -> None:
    model = build_model([SiteSpec()])
    next(node for node in model.graph if node.op_type == "Attention").domain = "com.microsoft"
    assert find_sites(model) == ([], [])


def test_names_with_slashes_are_module_paths() -> None:
    slashed = "/unet/" + site_name("up_blocks.1").replace(".", "/").replace("/0", ".0").replace("/1", ".1")
    assert slashed == "/unet/up_blocks.1/attentions.0/transformer_blocks.0/attn1"
    (site,), _ = find_sites(build_model([SiteSpec(name=slashed)], levels=3))
    assert (site.name, site.factor) == (site_name("up_blocks.1"), 2)


# Blocks with attention and the factor of their grid, of common UNets.
SD15 = {"down_blocks.0": 1, "down_blocks.1": 2, "down_blocks.2": 4, "mid_block": 8} | {
    "up_blocks.1": 4,
    "up_blocks.2": 2,
    "up_blocks.3": 1,
}
SDXL = {"down_blocks.1": 2, "down_blocks.2": 4, "mid_block": 4, "up_blocks.0": 4, "up_blocks.1": 2}
REFINER = {"down_blocks.1": 2, "down_blocks.2": 4, "mid_block": 8, "up_blocks.1": 4, "up_blocks.2": 2}


@pytest.mark.parametrize(
    ("levels", "factors"), [(4, SD15), (3, SDXL), (4, REFINER)], ids=["sd15", "sdxl", "refiner"]
)
def test_the_grid_follows_from_the_block(levels: int, factors: dict[str, int]) -> None:
    specs = [SiteSpec(name=site_name(block), factor=factor) for block, factor in factors.items()]
    sites, skipped = find_sites(build_model(specs, levels))
    assert skipped == []
    assert {site.name: site.factor for site in sites} == {
        site_name(block): factor for block, factor in factors.items()
    }

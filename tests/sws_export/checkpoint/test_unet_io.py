"""Inputs and outputs by architecture."""

from typing import Any

import pytest

from sws_export.checkpoint.unet_io import size_multiple, unet_inputs, unet_output
from sws_export.errors import ExportError
from sws_export.tensors import TensorSpec

SD15: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
}
SDXL: dict[str, Any] = SD15 | {
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int | str, ...]]:
    return {spec.name: spec.shape for spec in unet_inputs(config, "float16")}


def test_sd15() -> None:
    assert unet_inputs(SD15, "float16") == (
        TensorSpec("sample", "float16", ("batch", 4, "height", "width")),
        TensorSpec("timestep", "float32", ("batch",)),
        TensorSpec("encoder_hidden_states", "float16", ("batch", "tokens", 768)),
    )
    assert unet_output(SD15, "float16") == TensorSpec(
        "out_sample", "float16", ("batch", 4, "height", "width")
    )


def test_an_inpainting_unet_takes_more_channels_than_it_returns() -> None:
    config = SD15 | {"in_channels": 9}
    assert _shapes(config)["sample"] == ("batch", 9, "height", "width")
    assert unet_output(config, "float16").shape == ("batch", 4, "height", "width")


def test_sdxl_and_its_refiner_take_pooled_text_and_time_ids() -> None:
    assert list(_shapes(SDXL).items())[3:] == [("text_embeds", ("batch", 1280)), ("time_ids", ("batch", 6))]
    refiner = SDXL | {"projection_class_embeddings_input_dim": 2560}
    assert _shapes(refiner)["time_ids"] == ("batch", 5)


def test_lcm_takes_a_guidance_embedding() -> None:
    assert _shapes(SD15 | {"time_cond_proj_dim": 256})["timestep_cond"] == ("batch", 256)


@pytest.mark.parametrize(
    ("config", "spec"),
    [
        ({"num_class_embeds": 1000}, TensorSpec("class_labels", "int64", ("batch",))),
        ({"class_embed_type": "timestep"}, TensorSpec("class_labels", "float32", ("batch",))),
        (
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
            TensorSpec("class_labels", "float16", ("batch", 2048)),
        ),
    ],
)
def test_class_labels(config: dict[str, Any], spec: TensorSpec) -> None:
    assert unet_inputs(SD15 | config, "float16")[-1] == spec


def test_blocks_may_repeat_the_text_width() -> None:
    assert _shapes(SD15 | {"cross_attention_dim": [768] * 4})["encoder_hidden_states"][2] == 768


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"encoder_hid_dim_type": "text_proj"}, r"encoder_hid_dim_type = 'text_proj'.*not supported"),
        ({"cross_attention_dim": [768, 1024]}, "cross_attention_dim differs between blocks"),
        ({"class_embed_type": "identity"}, "class_embed_type 'identity' is not supported"),
        ({"addition_embed_type": "image"}, "addition_embed_type 'image' is not supported"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2817,
            },
            r"2817: expected 1280 .* multiple of addition_time_embed_dim \(256\)",
        ),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 1280,
            },
            "1280: expected 1280",
        ),
    ],
)
def test_what_the_graph_does_not_offer_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        unet_inputs(SD15 | config, "float16")


@pytest.mark.parametrize(("levels", "multiple"), [(1, 1), (3, 4), (4, 8)])
def test_each_level_but_the_last_halves_the_latent(levels: int, multiple: int) -> None:
    assert size_multiple({"block_out_channels": [32] * levels}) == multiple

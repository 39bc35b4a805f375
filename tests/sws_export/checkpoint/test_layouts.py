"""One UNet in both layouts with all prefixes, and models that are not a UNet."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from examples.make_checkpoint import family_config, ldm_names, write_checkpoint
from sws_export.checkpoint import Checkpoint, open_checkpoint, read_tensor
from sws_export.checkpoint.header import read_header
from sws_export.errors import CheckpointError
from tests.export_runs import check_names

PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def small_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SD 1.x in diffusers' layout, with its config.json."""
    directory = tmp_path_factory.mktemp("unet")
    return write_checkpoint(directory, family_config("tiny-sd", small=True))


@pytest.fixture(scope="module")
def weights(small_unet: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(stored) for name, stored in read_header(small_unet).tensors.items()}


@pytest.fixture(scope="module")
def original(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights in the original layout."""
    names = ldm_names(
        {name: tuple(value.shape) for name, value in weights.items()}, family_config("tiny-sd", small=True)
    )
    return {names[name]: value for name, value in weights.items()}


def same_weights(checkpoint: Checkpoint, weights: dict[str, torch.Tensor]) -> bool:
    return set(checkpoint.tensors) == set(weights) and all(
        torch.equal(read_tensor(checkpoint.tensors[name]), value) for name, value in weights.items()
    )


@pytest.mark.parametrize("prefix", ["", "unet.", "model.diffusion_model.", "diffusion_model."])
def test_diffusers_names(
    prefix: str, small_unet: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "x.safetensors"
    save_file({prefix + name: value for name, value in weights.items()}, file)
    checkpoint = open_checkpoint(file, small_unet.parent / "config.json")
    assert checkpoint.layout == "diffusers"
    assert same_weights(checkpoint, weights)


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "module._orig_mod.",
        "base_model.model.",
        "state_dict.unet.",
        "unet._orig_mod.",
        "base_model.model.unet.",
    ],
)
def test_wrapped_names(
    prefix: str, small_unet: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "x.safetensors"
    save_file({prefix + name: value for name, value in weights.items()}, file)
    checkpoint = open_checkpoint(file, small_unet.parent / "config.json")
    assert checkpoint.layout == "diffusers"
    assert same_weights(checkpoint, weights)
    assert checkpoint.ignored == {}


def test_wrapped_parts(small_unet: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    names = {name: name.replace(".attentions.0.", ".attentions.0._orig_mod.") for name in weights}
    save_file({names[name]: value for name, value in weights.items()}, file)
    assert same_weights(open_checkpoint(file, small_unet.parent / "config.json"), weights)


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model.", "state_dict.model.diffusion_model."]
)
def test_original_names(
    prefix: str,
    small_unet: Path,
    weights: dict[str, torch.Tensor],
    original: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    file = tmp_path / "x.safetensors"
    save_file({prefix + name.removeprefix(PREFIX): value for name, value in original.items()}, file)
    checkpoint = open_checkpoint(file, small_unet.parent / "config.json")
    assert checkpoint.layout == "ldm"
    assert same_weights(checkpoint, weights)
    assert check_names(checkpoint) == 0


def whole(original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint as trainers write it: UNet, EMA copy, VAE, text encoder, schedule."""
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value + 1
        for name, value in original.items()
    }
    other = {
        "first_stage_model.encoder.conv_in.weight": torch.zeros(3),
        "first_stage_model.decoder.conv_in.weight": torch.zeros(3),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.zeros(3),
        "control_model.input_blocks.0.0.weight": torch.zeros(3),
        "betas": torch.zeros(1000),
        "something.else": torch.zeros(1),
    }
    return (
        original
        | averages
        | {"model_ema.decay": torch.zeros(()), "model_ema.num_updates": torch.zeros(())}
        | other
    )


def test_whole_checkpoint_uses_the_unet_alone(
    small_unet: Path, weights: dict[str, torch.Tensor], original: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "whole.safetensors"
    save_file(whole(original), file)
    checkpoint = open_checkpoint(file, small_unet.parent / "config.json")
    assert same_weights(checkpoint, weights)
    assert checkpoint.ignored == {
        "VAE": 2,
        "text or image encoder": 1,
        "ControlNet": 1,
        "EMA copy of the UNet (--ema uses it)": len(weights) + 2,
        "noise schedule and training state": 1,
        "other": 1,
    }


def test_ema_takes_the_averages(
    small_unet: Path, weights: dict[str, torch.Tensor], original: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "whole.safetensors"
    save_file(whole(original), file)
    checkpoint = open_checkpoint(file, small_unet.parent / "config.json", ema=True)
    assert same_weights(checkpoint, {name: value + 1 for name, value in weights.items()})
    assert checkpoint.ignored["weights that the EMA copy replaces"] == len(weights)


def test_ema_where_there_is_none(small_unet: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no EMA weights .*omit --ema"):
        open_checkpoint(small_unet, ema=True)


def test_ema_that_is_incomplete(small_unet: Path, original: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = tmp_path / "whole.safetensors"
    tensors = whole(original)
    del tensors["model_ema.diffusion_modelout2bias"]
    save_file(tensors, file)
    with pytest.raises(
        CheckpointError, match=r"lacks 1 of \d+ tensors, first 'model_ema.diffusion_modelout2bias'"
    ):
        open_checkpoint(file, small_unet.parent / "config.json", ema=True)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (
            [
                "encoder.conv_in.weight",
                "encoder.down_blocks.0.resnets.0.conv1.weight",
                "decoder.conv_in.weight",
            ],
            "a VAE",
        ),
        (["first_stage_model.encoder.down.0.block.0.conv1.weight"], "a VAE"),
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "a LoRA"),
        (["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"], "a LoRA"),
        (["lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"], "a LoRA"),
        (["conv_in.base_layer.weight", "conv_in.lora_A.default.weight"], "a UNet with a LoRA that is loaded"),
        (["text_model.embeddings.token_embedding.weight"], "a text or image encoder"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a text or image encoder"),
        (["double_blocks.0.img_attn.qkv.weight"], "a Flux transformer"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "a Flux transformer"),
        (
            ["single_transformer_blocks.0.proj_mlp.weight", "transformer_blocks.0.attn.to_q.weight"],
            "a Flux transformer",
        ),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "an SD3 transformer"),
        (["transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"], "an SD3 transformer"),
        (["adaln_single.linear.weight", "caption_projection.linear_1.weight"], "a PixArt transformer"),
        (["transformer_blocks.0.attn1.to_q.weight"], "a diffusion transformer"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["adapter.body.0.resnets.0.block1.weight"], "a T2I-Adapter"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
        (["down_blocks.0.motion_modules.0.proj_in.weight"], "AnimateDiff motion modules"),
        (["emb_params"], "a textual inversion"),
    ],
)
def test_other_models_are_named(names: list[str], what: str, tmp_path: Path, write_sparse: Any) -> None:
    file = write_sparse(tmp_path / "x.safetensors", dict.fromkeys(names, (1,)))
    with pytest.raises(CheckpointError, match=f"is {what}.*expected a UNet2DConditionModel"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
        ("controlnet_down_blocks.0.weight", "a ControlNet"),
        (
            "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight",
            "a video UNet with motion modules",
        ),
        ("down_blocks.0.resnets.0.spatial_res_block.time_mixer.mix_factor", "a video UNet"),
        ("down_blocks.0.attentions.0.proj_in.weight.absmax", "a UNet quantized with bitsandbytes"),
        (
            "down_blocks.0.attentions.0.proj_in.base_layer.weight",
            "a UNet with a LoRA that is loaded but not fused",
        ),
    ],
)
def test_lookalikes_are_named(
    extra: str, what: str, tmp_path: Path, small_unet: Path, write_sparse: Any
) -> None:
    shapes = {name: stored.shape for name, stored in read_header(small_unet).tensors.items()}
    file = write_sparse(tmp_path / "x.safetensors", shapes | {extra: (1,)})
    with pytest.raises(CheckpointError, match=f"is {what}"):
        open_checkpoint(file, small_unet.parent / "config.json")


def test_original_controlnet(tmp_path: Path, original: dict[str, torch.Tensor]) -> None:
    file = tmp_path / "x.safetensors"
    names = {name.removeprefix(PREFIX): value for name, value in original.items()}
    save_file(names | {"input_hint_block.0.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="is a ControlNet"):
        open_checkpoint(file)


def test_nothing_known(tmp_path: Path, write_sparse: Any) -> None:
    file = write_sparse(tmp_path / "x.safetensors", {"a": (1,), "b": (2,)})
    with pytest.raises(CheckpointError, match=r"its 2 tensors \(a, b, ...\) include neither conv_in.weight"):
        open_checkpoint(file)


def test_empty_file_of_tensors(tmp_path: Path, write_sparse: Any) -> None:
    with pytest.raises(CheckpointError, match="its 0 tensors include neither"):
        open_checkpoint(write_sparse(tmp_path / "x.safetensors", {}))

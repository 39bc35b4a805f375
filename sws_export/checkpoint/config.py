"""Configurations of UNet2DConditionModel: reading config.json files and filling in defaults."""

import json
from pathlib import Path
from typing import Any

from sws_export.errors import CheckpointError

UNET_CLASS = "UNet2DConditionModel"

# diffusers' defaults of options that a config.json omits. Copied because importing diffusers takes seconds;
# a test compares them with the signature of the class.
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "only_cross_attention": False,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "upcast_attention": False,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}

# Written by diffusers' EMAModel beside the options of the UNet.
_EMA_OPTIONS = (
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with diffusers' defaults for omitted options, and without entries that start with `_`."""
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    return {**DEFAULTS, **public}


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        CheckpointError: The file cannot be read or does not contain a JSON object.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def read_unet_config(file: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The complete configuration in `file`, and remarks.

    Raises:
        CheckpointError: The file cannot be read, or is not the configuration of a UNet2DConditionModel.
    """
    content = read_json(file)
    found = content.get("_class_name")
    if found is None and "block_out_channels" not in content:
        raise CheckpointError(
            f"{file} is not the configuration of a {UNET_CLASS}: it has neither _class_name nor "
            "block_out_channels"
        )
    if found not in (None, UNET_CLASS):
        raise CheckpointError(f"{file} is the configuration of a {found}; expected a {UNET_CLASS}")
    unknown = sorted(name for name in content if not name.startswith("_") and name not in DEFAULTS)
    ignored = [name for name in unknown if name in _EMA_OPTIONS or content[name] is None]
    if unknown != ignored:
        name = next(name for name in unknown if name not in ignored)
        raise CheckpointError(
            f"{file}: unknown option '{name}' for a {UNET_CLASS}; remove it or update sws-export"
        )
    known = {name: value for name, value in content.items() if name not in ignored}
    return complete(known), (f"{file}: ignored {', '.join(ignored)}",) if ignored else ()

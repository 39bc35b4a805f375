"""Configurations of UNet2DConditionModel: reading config.json files and filling in defaults."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sws_export.checkpoint.schemas import MAX_TRANSFORMER_LAYERS, UnetConfig
from sws_export.documents import check_document, parse_json, read_text
from sws_export.errors import CheckpointError

T = TypeVar("T")

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


def read_json(file: Path, schema: type[T]) -> T:
    """The JSON object in `file`, checked against `schema`.

    Raises:
        CheckpointError: The file cannot be read, does not contain a JSON object, or a field is malformed.
    """
    try:
        content = parse_json(read_text(file))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    try:
        return check_document(content, schema)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def check_config(where: str, config: Mapping[str, Any]) -> None:
    """Check types and sizes in the configuration of a UNet, before anything is built from it.

    Args:
        where: Where it is from, for messages.
        config: Options, possibly not all.

    Raises:
        CheckpointError: Names the option, what was expected and what was found.
    """
    try:
        check_document(dict(config), UnetConfig)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    levels = len(config.get("block_out_channels", DEFAULTS["block_out_channels"]))
    layers, depths = (
        _by_level(config.get(name, DEFAULTS[name]), levels)
        for name in ("layers_per_block", "transformer_layers_per_block")
    )
    # Down and up blocks, and one more layer in each up block.
    total = sum(
        (2 * count + 1) * (max(depth) if isinstance(depth, list) else depth)
        for count, depth in zip(layers, depths, strict=False)
    )
    if total > MAX_TRANSFORMER_LAYERS:
        raise CheckpointError(
            f"{where}: layers_per_block and transformer_layers_per_block give {total} transformer layers, "
            f"expected at most {MAX_TRANSFORMER_LAYERS}"
        )


def _by_level(value: Any, levels: int) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value] * levels


def read_unet_config(file: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The complete configuration in `file`, and remarks.

    Raises:
        CheckpointError: The file cannot be read, or is not the configuration of a UNet2DConditionModel.
    """
    content: dict[str, Any] = read_json(file, dict[str, Any])
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
    check_config(str(file), known)
    return complete(known), (f"{file}: ignored {', '.join(ignored)}",) if ignored else ()

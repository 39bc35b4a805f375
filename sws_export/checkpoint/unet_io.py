"""Inputs and output of the UNet that a diffusers config describes."""

from collections.abc import Mapping
from typing import Any

from sws_export.checkpoint.ip_adapter import IP_ADAPTER, image_inputs
from sws_export.errors import ExportError
from sws_export.tensors import DOWN_RESIDUAL, MID_RESIDUAL, TensorSpec

# Width of the pooled text embedding that every SDXL model takes.
_POOLED_TEXT_WIDTH = 1280


def unet_inputs(config: Mapping[str, Any], dtype: str, *, controlnet: bool = False) -> tuple[TensorSpec, ...]:
    """Inputs of the UNet that a diffusers `UNet2DConditionModel` config describes.

    Args:
        config: The model's configuration.
        dtype: dtype of the exported model.
        controlnet: Whether the graph takes the residuals of a ControlNet.

    Raises:
        ExportError: The architecture takes an input that is not supported.
    """
    inputs = [
        TensorSpec("sample", dtype, ("batch", config["in_channels"], "height", "width")),
        TensorSpec("timestep", "float32", ("batch",)),
        TensorSpec("encoder_hidden_states", dtype, ("batch", "tokens", _text_width(config))),
    ]
    if config.get("time_cond_proj_dim") is not None:
        inputs.append(TensorSpec("timestep_cond", dtype, ("batch", config["time_cond_proj_dim"])))
    inputs += [TensorSpec(name, dtype, ("batch", 1, width)) for name, width in image_inputs(config).items()]
    inputs += _class_inputs(config, dtype)
    inputs += _added_condition_inputs(config, dtype)
    if controlnet:
        inputs += _residual_inputs(config, dtype)
    return tuple(inputs)


def _residual_inputs(config: Mapping[str, Any], dtype: str) -> list[TensorSpec]:
    """One residual for each skip connection, in the order of diffusers' ControlNet, and the mid block's."""
    channels = config["block_out_channels"]
    layers = config["layers_per_block"]
    per_level = [layers] * len(channels) if isinstance(layers, int) else list(layers)
    shapes = [_residual_shape(channels[0], 0)]
    for level, width in enumerate(channels):
        shapes += [_residual_shape(width, level)] * per_level[level]
        if level < len(channels) - 1:
            shapes.append(_residual_shape(width, level + 1))
    residuals = [TensorSpec(f"{DOWN_RESIDUAL}{index}", dtype, shape) for index, shape in enumerate(shapes)]
    return [*residuals, TensorSpec(MID_RESIDUAL, dtype, shapes[-1])]


def _residual_shape(width: int, level: int) -> tuple[int | str, ...]:
    sides = [side if level == 0 else f"{side}/{2**level}" for side in ("height", "width")]
    return ("batch", width, *sides)


def unet_output(config: Mapping[str, Any], dtype: str) -> TensorSpec:
    """The prediction, [batch, out_channels, height, width]."""
    return TensorSpec("out_sample", dtype, ("batch", config["out_channels"], "height", "width"))


def size_multiple(config: Mapping[str, Any]) -> int:
    """Required divisor of the latent's height and width: each level but the last halves them."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _text_width(config: Mapping[str, Any]) -> int:
    if config.get("dual_cross_attention"):
        raise ExportError(
            "the UNet has dual_cross_attention (two transformers for two texts in each block), which "
            "diffusers' UNet2DConditionModel itself cannot run; export a UNet with one text input"
        )
    if config.get("encoder_hid_dim_type") not in (None, IP_ADAPTER):
        raise ExportError(
            f"the UNet projects its text input (encoder_hid_dim_type = {config['encoder_hid_dim_type']!r}), "
            "which is not supported; export a Stable Diffusion UNet that takes text embeddings directly"
        )
    width = config["cross_attention_dim"]
    if not isinstance(width, int):
        if len(set(width)) != 1:
            raise ExportError(
                f"the UNet's cross_attention_dim differs between blocks ({width}); expected one width"
            )
        width = width[0]
    return int(width)


def _class_inputs(config: Mapping[str, Any], dtype: str) -> list[TensorSpec]:
    kind = config.get("class_embed_type")
    if kind is None and config.get("num_class_embeds") is None:
        return []
    if kind is None:
        return [TensorSpec("class_labels", "int64", ("batch",))]
    if kind == "timestep":
        return [TensorSpec("class_labels", "float32", ("batch",))]
    if kind in ("projection", "simple_projection"):
        width = config["projection_class_embeddings_input_dim"]
        return [TensorSpec("class_labels", dtype, ("batch", width))]
    raise ExportError(
        f"class_embed_type {kind!r} is not supported; expected timestep, projection or simple_projection"
    )


def _added_condition_inputs(config: Mapping[str, Any], dtype: str) -> list[TensorSpec]:
    kind = config.get("addition_embed_type")
    if kind is None:
        return []
    if kind != "text_time":
        raise ExportError(
            f"addition_embed_type {kind!r} is not supported; expected 'text_time' (Stable Diffusion XL)"
        )
    remaining = config["projection_class_embeddings_input_dim"] - _POOLED_TEXT_WIDTH
    time_ids, rest = divmod(remaining, config["addition_time_embed_dim"])
    if rest or time_ids < 1:
        raise ExportError(
            f"projection_class_embeddings_input_dim {config['projection_class_embeddings_input_dim']}: "
            f"expected {_POOLED_TEXT_WIDTH} (pooled text embedding) plus a multiple of "
            f"addition_time_embed_dim ({config['addition_time_embed_dim']})"
        )
    return [
        TensorSpec("text_embeds", dtype, ("batch", _POOLED_TEXT_WIDTH)),
        TensorSpec("time_ids", dtype, ("batch", time_ids)),
    ]

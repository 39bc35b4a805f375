"""The part of a UNet's architecture that tensor names and shapes determine."""

from dataclasses import dataclass
from typing import Any

from sws_export.errors import CheckpointError

Depths = tuple[int, ...]
"""Number of transformer layers after each residual layer of one level, 0 without attention."""


@dataclass(frozen=True)
class Structure:
    """The structure of a UNet2DConditionModel, as far as its tensors' shapes determine it.

    Attributes:
        in_channels: Channels of the input latent.
        out_channels: Channels of the output.
        channels: Output channels of each level, highest resolution first.
        down: Transformer depths of each down block, highest resolution first.
        mid: Transformer depths of the mid block; () for residual blocks only, None without a mid block.
        up: Transformer depths of each up block, lowest resolution first.
        context: Width of the text embeddings, None without cross-attention.
        linear: Whether the transformers' projections are linear layers instead of 1 × 1 convolutions.
        cross_only: Whether the first attention of each level is cross-attention, too.
        addition: Input width of SDXL's added conditions (text_embeds and time_ids together).
        class_projection: Input width of a projected class embedding (unCLIP).
        classes: Number of classes of a class embedding table.
        time_cond: Width of `timestep_cond` (LCM's guidance embedding).
    """

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    down: tuple[Depths, ...]
    mid: Depths | None
    up: tuple[Depths, ...]
    context: int | None
    linear: bool
    cross_only: tuple[bool, ...]
    addition: int | None = None
    class_projection: int | None = None
    classes: int | None = None
    time_cond: int | None = None


def structure_config(structure: Structure) -> dict[str, Any]:
    """The part of a UNet2DConditionModel configuration that `structure` determines.

    Raises:
        CheckpointError: UNet2DConditionModel does not support this structure.
    """
    layers = [len(depths) for depths in structure.down]
    up_layers = [len(depths) for depths in structure.up]
    if up_layers != [count + 1 for count in reversed(layers)]:
        raise CheckpointError(
            f"the UNet has {layers} layers in its down blocks and {up_layers} in its up blocks; "
            "expected one more in the up block of each level"
        )
    depths, reverse = _transformer_layers(structure)
    return {
        "in_channels": structure.in_channels,
        "out_channels": structure.out_channels,
        "block_out_channels": list(structure.channels),
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "down_block_types": [_block_type(level, "Down") for level in structure.down],
        "mid_block_type": _mid_block_type(structure.mid),
        "up_block_types": [_block_type(level, "Up") for level in structure.up],
        "transformer_layers_per_block": depths,
        "reverse_transformer_layers_per_block": reverse,
        "cross_attention_dim": structure.context if structure.context is not None else 1280,
        "use_linear_projection": structure.linear,
        "only_cross_attention": list(structure.cross_only) if any(structure.cross_only) else False,
        "addition_embed_type": "text_time" if structure.addition is not None else None,
        "class_embed_type": "projection" if structure.class_projection is not None else None,
        "projection_class_embeddings_input_dim": structure.addition or structure.class_projection,
        "num_class_embeds": structure.classes,
        "time_cond_proj_dim": structure.time_cond,
    }


def _block_type(level: Depths, direction: str) -> str:
    if all(depth > 0 for depth in level):
        return f"CrossAttn{direction}Block2D"
    if not any(level):
        return f"{direction}Block2D"
    raise CheckpointError(
        f"one level of the UNet has attention in some of its layers only (transformer depths {list(level)}); "
        "UNet2DConditionModel supports it in all layers or none"
    )


def _mid_block_type(mid: Depths | None) -> str | None:
    if mid is None:
        return None
    return "UNetMidBlock2DCrossAttn" if mid else "UNetMidBlock2D"


def _transformer_layers(structure: Structure) -> tuple[Any, Any]:
    """`transformer_layers_per_block` and `reverse_transformer_layers_per_block`."""
    levels = [_depth_option(level) for level in structure.down]
    # diffusers uses the depth of the last level for the mid block, even if that level has no attention.
    if structure.mid:
        if not any(structure.down[-1]):
            levels[-1] = structure.mid[0]
        elif structure.mid[0] != structure.down[-1][0]:
            raise CheckpointError(
                f"the UNet has {structure.mid[0]} transformer layers in its mid block and "
                f"{structure.down[-1][0]} in its last down block; expected the same number in both"
            )
    mirrored = all(
        not any(level) or _depth_option(level) == depth
        for level, depth in zip(structure.up, reversed(levels), strict=True)
    )
    reverse = None if mirrored else [_depth_option(level) for level in structure.up]
    if all(level == levels[0] for level in levels) and isinstance(levels[0], int):
        return levels[0], reverse
    return levels, reverse


def _depth_option(level: Depths) -> int | list[int]:
    """One level's value of `transformer_layers_per_block`; diffusers ignores it without attention."""
    if not any(level):
        return 1
    return level[0] if len(set(level)) == 1 else list(level)

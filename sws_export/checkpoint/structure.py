"""The architecture that tensor names and shapes tell, and nothing more."""

from dataclasses import dataclass
from typing import Any

from sws_export.errors import CheckpointError

# Transformer layers (0 = no attention) of each residual layer of one level.
Depths = tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """What the shapes of a UNet2DConditionModel's tensors determine.

    Attributes:
        channels: Output channels of each level, from the full resolution down.
        down: For each level, from the full resolution down, the depth of each layer's transformer.
        mid: The same for the middle; () is a residual block alone, None no middle at all.
        up: For each level, from the lowest resolution up.
        context: Width of the text embedding, None without cross-attention.
        linear: Transformers project with linear layers and not with 1 × 1 convolutions.
        cross_only: Levels whose first attention looks at the text, too.
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
        CheckpointError: diffusers has no configuration for such a UNet.
    """
    layers = [len(depths) for depths in structure.down]
    if [len(depths) for depths in structure.up] != [count + 1 for count in reversed(layers)]:
        raise CheckpointError(
            f"the UNet has {layers} layers on the way down and {[len(depths) for depths in structure.up]} "
            "on the way up; UNet2DConditionModel has one more up than down on each level"
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
        f"a level of the UNet has attention in some of its layers only (transformer depths {list(level)}); "
        "UNet2DConditionModel has it in all or none"
    )


def _mid_block_type(mid: Depths | None) -> str | None:
    if mid is None:
        return None
    return "UNetMidBlock2DCrossAttn" if mid else "UNetMidBlock2D"


def _transformer_layers(structure: Structure) -> tuple[Any, Any]:
    """`transformer_layers_per_block` and `reverse_transformer_layers_per_block`."""
    levels = [_joined(level) for level in structure.down]
    # diffusers takes the depth of the middle from the last level, whether that has attention or not.
    if structure.mid:
        if not any(structure.down[-1]):
            levels[-1] = structure.mid[0]
        elif structure.mid[0] != structure.down[-1][0]:
            raise CheckpointError(
                f"the middle of the UNet has {structure.mid[0]} transformer layers and the level before it "
                f"{structure.down[-1][0]}; UNet2DConditionModel has the same number in both"
            )
    mirrored = all(
        not any(level) or _joined(level) == depth
        for level, depth in zip(structure.up, reversed(levels), strict=True)
    )
    reverse = None if mirrored else [_joined(level) for level in structure.up]
    if all(level == levels[0] for level in levels) and isinstance(levels[0], int):
        return levels[0], reverse
    return levels, reverse


def _joined(level: Depths) -> int | list[int]:
    if not any(level):
        return 1
    return level[0] if len(set(level)) == 1 else list(level)

"""Reads the structure of a UNet from tensor names and shapes, in diffusers' and in the original layout."""

from collections.abc import Mapping

from sws_export.checkpoint.header import StoredTensor
from sws_export.checkpoint.structure import Depths, Structure
from sws_export.errors import CheckpointError

# Widths of the text embeddings of the SDXL base and refiner, whose label embedding takes text_embeds and
# time_ids. With any other width it is unCLIP's projected image embedding. diffusers has the same rule.
_SDXL_CONTEXTS = (2048, 1280)


class _Names:
    """Queries on a set of tensor names with shapes."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = stored
        self.modules = {name[:end] for name in stored for end, letter in enumerate(name) if letter == "."}

    def size(self, name: str, axis: int) -> int:
        """Size along `axis` of a required tensor."""
        found = self.optional(name, axis)
        if found is None:
            raise CheckpointError(
                f"the checkpoint lacks tensor '{name}', which every UNet2DConditionModel has"
            )
        return found

    def optional(self, name: str, axis: int) -> int | None:
        """Size along `axis` of an optional tensor, None if it is missing."""
        if name not in self.stored:
            return None
        shape = self.stored[name].shape
        if axis >= len(shape):
            raise CheckpointError(
                f"tensor '{name}' has {len(shape)} dimensions, expected at least {axis + 1}"
            )
        return shape[axis]

    def count(self, module: str) -> int:
        """Number of children of `module` that are named 0, 1, 2, ..."""
        number = 0
        while f"{module}.{number}" in self.modules:
            number += 1
        return number


def read_diffusers_structure(stored: Mapping[str, StoredTensor]) -> Structure:
    """The structure of a UNet in diffusers' layout.

    Raises:
        CheckpointError: A required tensor is missing.
    """
    names = _Names(stored)
    levels = range(names.count("down_blocks"))
    channels = tuple(names.size(f"down_blocks.{level}.resnets.0.conv1.weight", 0) for level in levels)
    down = tuple(_diffusers_depths(names, f"down_blocks.{level}") for level in levels)
    up = tuple(_diffusers_depths(names, f"up_blocks.{level}") for level in range(names.count("up_blocks")))
    mid = None
    if "mid_block" in names.modules:
        mid = tuple(
            names.count(f"mid_block.attentions.{number}.transformer_blocks")
            for number in range(names.count("mid_block.attentions"))
        )
    first = [f"down_blocks.{level}.attentions.0" for level in levels]
    context, linear = _attention(names)
    return Structure(
        in_channels=names.size("conv_in.weight", 1),
        out_channels=names.size("conv_out.weight", 0),
        channels=channels,
        down=down,
        mid=mid,
        up=up,
        context=context,
        linear=linear,
        cross_only=_cross_only(names, first, channels),
        addition=names.optional("add_embedding.linear_1.weight", 1),
        class_projection=names.optional("class_embedding.linear_1.weight", 1),
        classes=names.optional("class_embedding.weight", 0),
        time_cond=names.optional("time_embedding.cond_proj.weight", 1),
    )


def _diffusers_depths(names: _Names, block: str) -> Depths:
    return tuple(
        names.count(f"{block}.attentions.{layer}.transformer_blocks")
        for layer in range(names.count(f"{block}.resnets"))
    )


def read_ldm_structure(stored: Mapping[str, StoredTensor]) -> Structure:
    """The structure of a UNet in the original layout; names without prefix.

    Raises:
        CheckpointError: A required tensor is missing.
    """
    names = _Names(stored)
    channels: list[int] = []
    down: list[list[int]] = [[]]
    first: list[str] = []
    for block in range(1, names.count("input_blocks")):
        if f"input_blocks.{block}.0.op" in names.modules:
            down.append([])
            continue
        if not down[-1]:
            channels.append(names.size(f"input_blocks.{block}.0.out_layers.3.weight", 0))
            first.append(f"input_blocks.{block}.1")
        down[-1].append(names.count(f"input_blocks.{block}.1.transformer_blocks"))
    mid: Depths | None = None
    if "middle_block" in names.modules:
        depth = names.count("middle_block.1.transformer_blocks")
        mid = (depth,) if depth else ()
    context, linear = _attention(names)
    label = names.optional("label_emb.0.0.weight", 1)
    sdxl = context in _SDXL_CONTEXTS
    return Structure(
        in_channels=names.size("input_blocks.0.0.weight", 1),
        out_channels=names.size("out.2.weight", 0),
        channels=tuple(channels),
        down=tuple(tuple(level) for level in down),
        mid=mid,
        up=_ldm_up(names),
        context=context,
        linear=linear,
        cross_only=_cross_only(names, first, channels),
        addition=label if sdxl else None,
        class_projection=None if sdxl else label,
        classes=names.optional("label_emb.weight", 0),
        time_cond=names.optional("time_embed.cond_proj.weight", 1),
    )


def _ldm_up(names: _Names) -> tuple[Depths, ...]:
    """Transformer depths of the up blocks; each level but the last ends with an upsampling convolution."""
    up: list[list[int]] = [[]]
    for block in range(names.count("output_blocks")):
        up[-1].append(names.count(f"output_blocks.{block}.1.transformer_blocks"))
        if {f"output_blocks.{block}.1.conv", f"output_blocks.{block}.2.conv"} & names.modules:
            up.append([])
    return tuple(tuple(level) for level in up)


def _attention(names: _Names) -> tuple[int | None, bool]:
    """Width of the text embeddings, and whether the transformers' projections are linear layers."""
    widths = {names.size(name, 1) for name in names.stored if name.endswith(".attn2.to_k.weight")}
    if len(widths) > 1:
        raise CheckpointError(
            f"the UNet attends to text embeddings of several widths ({sorted(widths)}); "
            "pass its configuration with --config FILE"
        )
    ranks = {len(tensor.shape) for name, tensor in names.stored.items() if name.endswith(".proj_in.weight")}
    return (widths.pop() if widths else None), ranks == {2}


def _cross_only(
    names: _Names, attentions: list[str], channels: "list[int] | tuple[int, ...]"
) -> tuple[bool, ...]:
    """Whether `attn1` of each level has keys of another width than its queries."""
    return tuple(
        names.optional(f"{attention}.transformer_blocks.0.attn1.to_k.weight", 1) not in (None, width)
        for attention, width in zip(attentions, channels, strict=True)
    )

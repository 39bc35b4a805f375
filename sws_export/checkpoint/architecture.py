"""The configuration of a UNet: from a file, or from its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sws_export.checkpoint.config import complete, read_unet_config
from sws_export.checkpoint.families import Family, find_family, find_relative
from sws_export.checkpoint.foreign import name_untellable
from sws_export.checkpoint.header import StoredTensor
from sws_export.checkpoint.layouts import Layout
from sws_export.checkpoint.read_structure import read_diffusers_structure, read_ldm_structure
from sws_export.checkpoint.structure import Structure, structure_config
from sws_export.errors import CheckpointError


@dataclass(frozen=True)
class Architecture:
    """A complete configuration, where it comes from, and the family its structure belongs to, if any."""

    config: dict[str, Any]
    source: str
    family: Family | None
    remarks: tuple[str, ...] = ()


def read_architecture(
    path: Path,
    layout: Layout,
    stored: Mapping[str, StoredTensor],
    config: Path | None,
    given: bool,
    heads: tuple[int, ...] | None,
) -> Architecture:
    """Take the configuration from the file `config` if there is one, else from the names and shapes.

    Args:
        path: For messages.
        layout: How `stored` is named.
        stored: The UNet's tensors, without prefix.
        config: A configuration file, or None.
        given: The user named that file; otherwise it lies beside the weights.
        heads: Attention heads of each level, or one number for all, where the user gave them.

    Raises:
        CheckpointError: The file is no UNet configuration, or the tensors leave something open.
    """
    if config is not None:
        source = f"--config {config}" if given else f"{config.name} beside the weights"
        family = _family_or_none(layout, stored)
        result = Architecture(read_unet_config(config), source, family)
    else:
        result = _infer(path, _read_structure(layout, stored), stored, heads)
    if heads is None:
        return result
    levels = len(result.config["block_out_channels"])
    if len(heads) not in (1, levels):
        raise CheckpointError(
            f"--attention-head-dim: expected 1 number or {levels} (the levels of {path}), found {len(heads)}"
        )
    changed = result.config | {"attention_head_dim": heads[0] if len(heads) == 1 else list(heads)}
    return Architecture(changed, f"{result.source}, --attention-head-dim", result.family, result.remarks)


def _read_structure(layout: Layout, stored: Mapping[str, StoredTensor]) -> Structure:
    return read_ldm_structure(stored) if layout == "ldm" else read_diffusers_structure(stored)


def _family_or_none(layout: Layout, stored: Mapping[str, StoredTensor]) -> Family | None:
    """The family, where a configuration was given and the structure does not have to be understood."""
    try:
        return find_family(_read_structure(layout, stored))
    except (CheckpointError, IndexError):
        return None


def _infer(
    path: Path, structure: Structure, stored: Mapping[str, StoredTensor], heads: tuple[int, ...] | None
) -> Architecture:
    if structure.context is None:
        raise CheckpointError(
            f"{path} is a UNet without cross-attention (an unconditional UNet2DModel); "
            "expected a UNet2DConditionModel"
        )
    untellable = name_untellable(stored)
    if untellable is not None:
        raise CheckpointError(
            f"{path} is a UNet with {untellable}, whose configuration the tensors do not tell; "
            "give it with --config FILE (unet/config.json of the model)"
        )
    family = find_family(structure)
    if family is not None:
        return Architecture(family.config(), f"inferred from tensor shapes: {family.name}", family)
    shapes = structure_config(structure)
    if structure.addition is not None:
        raise CheckpointError(
            f"{path}: {_describe(structure)}. It takes added conditions, and shapes do not tell how wide the "
            "embedding of time_ids is: give the configuration with --config FILE"
        )
    if any(channels % 32 for channels in structure.channels):
        raise CheckpointError(
            f"{path}: {_describe(structure)}. Its channels are no multiples of 32, the usual number of "
            "normalisation groups; shapes do not tell that number: give the configuration with --config FILE"
        )
    if heads is None:
        raise CheckpointError(
            f"{path}: {_describe(structure)}. Shapes do not tell how many attention heads it has: give them "
            f"with --attention-head-dim, one number for all levels or one a level{_hint(structure)}, "
            "or the whole configuration with --config FILE"
        )
    remark = f"{path.name}: no known family; what shapes do not tell is as diffusers has it (32 groups, SiLU)"
    return Architecture(complete(shapes), "inferred from tensor shapes", None, (remark,))


def _describe(structure: Structure) -> str:
    depths = ", ".join("/".join(map(str, level)) for level in structure.down)
    return (
        f"a UNet of no known family: {structure.in_channels} input channels, levels of "
        f"{', '.join(map(str, structure.channels))} channels, transformer depths {depths}, "
        f"texts {structure.context} wide"
    )


def _hint(structure: Structure) -> str:
    relative = find_relative(structure)
    if relative is not None:
        return f" (the rest is that of {relative.name}, which has {','.join(map(str, relative.heads))})"
    sizes = ",".join(str(channels // 64) for channels in structure.channels)
    return f" (SD 1.x has 8 on all levels, SD 2.x and SDXL heads of 64 channels, here {sizes})"

"""The configuration of a UNet: read from a file, or inferred from its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sws_export.checkpoint.config import complete, read_unet_config
from sws_export.checkpoint.families import (
    SDXL_ADDITIONS,
    SDXL_TIME_IDS,
    Family,
    find_family,
    find_family_with_other_inputs,
)
from sws_export.checkpoint.header import StoredTensor
from sws_export.checkpoint.layouts import Layout
from sws_export.checkpoint.other_models import part_that_needs_config
from sws_export.checkpoint.read_structure import read_diffusers_structure, read_ldm_structure
from sws_export.checkpoint.structure import Structure, structure_config
from sws_export.errors import CheckpointError


@dataclass(frozen=True)
class Architecture:
    """A complete configuration of a UNet2DConditionModel.

    Attributes:
        config: The configuration, with a value for every option.
        source: Where it was read from or inferred from, for the log.
        family: The known family with the same structure, or None.
        structure: The structure, or None if it cannot be read.
        remarks: Notes for the user.
    """

    config: dict[str, Any]
    source: str
    family: Family | None
    structure: Structure | None
    remarks: tuple[str, ...] = ()


def read_architecture(
    path: Path,
    layout: Layout,
    stored: Mapping[str, StoredTensor],
    config: Path | None,
    given: bool,
    heads: tuple[int, ...] | None,
) -> Architecture:
    """Read the configuration from the file `config`, or infer it from tensor names and shapes if it is None.

    Args:
        path: The checkpoint, for messages.
        layout: The layout of the names in `stored`.
        stored: The UNet's tensors, without prefix.
        config: A configuration file, or None.
        given: Whether the user named that file with `--config`; otherwise it was found beside the weights.
        heads: Number of attention heads of each level, or one number for all levels; None if not given.

    Raises:
        CheckpointError: The file is not a UNet configuration, or the tensors do not determine one.
    """
    if config is not None:
        source = f"--config {config}" if given else f"{config.name} beside the weights"
        structure = _structure_or_none(layout, stored)
        family = None
        if structure is not None:
            family = find_family(structure) or find_family_with_other_inputs(structure)
        content, remarks = read_unet_config(config)
        result = Architecture(content, source, family, structure, remarks)
    else:
        result = _infer(path, _read_structure(layout, stored), stored, heads)
    if heads is None:
        return result
    levels = len(result.config["block_out_channels"])
    if len(heads) not in (1, levels):
        raise CheckpointError(
            f"--attention-head-dim: expected 1 number or {levels} (one for each level of {path}), "
            f"found {len(heads)}"
        )
    changed = result.config | {"attention_head_dim": heads[0] if len(heads) == 1 else list(heads)}
    return replace(result, config=changed, source=f"{result.source}, --attention-head-dim")


def _read_structure(layout: Layout, stored: Mapping[str, StoredTensor]) -> Structure:
    return read_ldm_structure(stored) if layout == "ldm" else read_diffusers_structure(stored)


def _structure_or_none(layout: Layout, stored: Mapping[str, StoredTensor]) -> Structure | None:
    """The structure, or None if it cannot be read, which is no error where the configuration is known."""
    try:
        return _read_structure(layout, stored)
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
    part = part_that_needs_config(stored)
    if part is not None:
        raise CheckpointError(
            f"{path} is a UNet with {part}, whose configuration cannot be inferred from tensor shapes; "
            "pass it with --config FILE (unet/config.json of the model)"
        )
    family = find_family(structure)
    if family is not None:
        return Architecture(family.config(), f"inferred from tensor shapes: {family.name}", family, structure)
    family = find_family_with_other_inputs(structure)
    if family is not None:
        source = f"inferred from tensor shapes: {family.name} with {structure.in_channels} input channels"
        return Architecture(replace(family, structure=structure).config(), source, family, structure)
    shapes = structure_config(structure) | _added_conditions(path, structure)
    if any(channels % 32 for channels in structure.channels):
        raise CheckpointError(
            f"{path}: {_describe(structure)}. Its channels are not multiples of 32, the usual number of "
            "normalization groups, and tensor shapes do not determine that number: pass the configuration "
            "with --config FILE"
        )
    if heads is None:
        raise CheckpointError(
            f"{path}: {_describe(structure)}. Tensor shapes do not determine the number of attention heads: "
            "pass it with --attention-head-dim, one number for all levels or one for each level"
            f"{_heads_hint(structure)}, or pass the whole configuration with --config FILE"
        )
    assumed = "32 normalization groups, SiLU"
    if structure.addition is not None:
        assumed += ", and time_ids as in SDXL"
    remark = (
        f"{path.name}: unknown family; diffusers' defaults are used where tensor shapes do not determine an "
        f"option ({assumed})"
    )
    return Architecture(complete(shapes), "inferred from tensor shapes", None, structure, (remark,))


def _added_conditions(path: Path, structure: Structure) -> dict[str, Any]:
    """The width of the embedding of each number of time_ids, where the added conditions are those of SDXL.

    Raises:
        CheckpointError: The total width is neither that of SDXL nor that of its refiner.
    """
    if structure.addition is None:
        return {}
    if structure.addition not in SDXL_ADDITIONS:
        raise CheckpointError(
            f"{path}: {_describe(structure)}. It takes added conditions of width {structure.addition}, and "
            "tensor shapes do not determine the width of the time_ids embedding: pass the configuration with "
            "--config FILE"
        )
    return {"addition_time_embed_dim": SDXL_TIME_IDS}


def _describe(structure: Structure) -> str:
    depths = ", ".join("/".join(map(str, level)) for level in structure.down)
    return (
        f"a UNet of an unknown family: {structure.in_channels} input channels, levels of "
        f"{', '.join(map(str, structure.channels))} channels, transformer depths {depths}, "
        f"text embeddings of width {structure.context}"
    )


def _heads_hint(structure: Structure) -> str:
    heads = ",".join(str(channels // 64) for channels in structure.channels)
    return f" (SD 1.x has 8 on all levels; SD 2.x and SDXL have heads of 64 channels, here {heads})"

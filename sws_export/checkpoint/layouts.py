"""Finds the UNet among the tensors of a file, whatever they are called."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sws_export.checkpoint.foreign import name_lookalike, name_other_model
from sws_export.checkpoint.header import StoredTensor
from sws_export.errors import CheckpointError

Layout = Literal["diffusers", "ldm"]

# The original layout's prefix, ComfyUI's and its own model savers', and that of whole pipelines in one file.
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "unet.")

# A tensor that every UNet of the layout has.
_WITNESSES: tuple[tuple[Layout, str, str], ...] = (
    ("ldm", "input_blocks.0.0.weight", "input_blocks.1.0.in_layers.0.weight"),
    ("diffusers", "conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
)

_EMA_PREFIX = "model_ema."
_EMA_ONLY_FOR = "model.diffusion_model."

_REASONS = (
    ("VAE", ("first_stage_model.", "vae.")),
    (
        "text or image encoder",
        ("cond_stage_model.", "conditioner.", "text_encoder", "embedder.", "image_encoder"),
    ),
    ("ControlNet", ("control_model.",)),
    ("EMA copy of the UNet (--ema takes it)", (_EMA_PREFIX,)),
)


@dataclass(frozen=True)
class FoundUnet:
    """The UNet's tensors under their stored names without prefix, and the number of others by reason."""

    layout: Layout
    stored: dict[str, StoredTensor]
    ignored: dict[str, int]


def find_unet(path: Path, tensors: Mapping[str, StoredTensor], ema: bool) -> FoundUnet:
    """Pick the UNet's tensors out of `tensors`; with `ema` their exponential moving averages.

    Raises:
        CheckpointError: There is no UNet, something that only looks like one, or no EMA copy of it.
    """
    found = _find_prefix(tensors)
    if found is None:
        raise CheckpointError(_no_unet_message(path, tensors))
    layout, prefix = found
    stored = {
        name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
    }
    # Without a prefix everything in the file counts as the UNet's; strangers are counted when names are used.
    what = name_lookalike(stored)
    if what is not None:
        raise CheckpointError(f"{path} is {what}; expected a UNet2DConditionModel")
    if not ema:
        return FoundUnet(layout, stored, _count_ignored(tensors, prefix))
    return FoundUnet(layout, _averages(path, tensors, stored, prefix), _count_ignored(tensors, _EMA_PREFIX))


def _find_prefix(tensors: Mapping[str, StoredTensor]) -> tuple[Layout, str] | None:
    for prefix in _PREFIXES:
        for layout, *witnesses in _WITNESSES:
            if all(prefix + witness in tensors for witness in witnesses):
                return layout, prefix
    return None


def _averages(
    path: Path, tensors: Mapping[str, StoredTensor], stored: Mapping[str, StoredTensor], prefix: str
) -> dict[str, StoredTensor]:
    """LDM's EMA copy: the names lose their dots, so they are found by way of the other copy's names."""
    if prefix != _EMA_ONLY_FOR or not any(name.startswith(_EMA_PREFIX) for name in tensors):
        raise CheckpointError(f"{path} has no EMA weights (tensors called {_EMA_PREFIX}...); leave out --ema")
    names = {name: _EMA_PREFIX + "diffusion_model" + name.replace(".", "") for name in stored}
    missing = [average for average in names.values() if average not in tensors]
    if missing:
        raise CheckpointError(
            f"{path}: the EMA copy lacks {len(missing)} of {len(names)} tensors, first '{missing[0]}'; "
            "leave out --ema"
        )
    return {name: tensors[average] for name, average in names.items()}


def _count_ignored(tensors: Mapping[str, StoredTensor], used: str) -> dict[str, int]:
    """Number of tensors that do not begin with `used`, by what they are."""
    counts = Counter(_reason(name, used) for name in tensors if not name.startswith(used))
    return dict(counts.most_common())


def _reason(name: str, used: str) -> str:
    if used == _EMA_PREFIX and name.startswith(_EMA_ONLY_FOR):
        return "weights that the EMA copy replaces"
    for reason, prefixes in _REASONS:
        if name.startswith(prefixes):
            return reason
    return "other" if "." in name else "noise schedule and training state"


def _no_unet_message(path: Path, tensors: Mapping[str, StoredTensor]) -> str:
    what = name_other_model(tensors)
    if what is not None:
        return f"{path} is {what}; expected a UNet2DConditionModel"
    names = list(tensors)[:3]
    shown = f" ({', '.join(names)}, ...)" if names else ""
    return (
        f"{path} holds no UNet2DConditionModel: among its {len(tensors)} tensors{shown} is neither "
        "conv_in.weight with down_blocks (diffusers) nor input_blocks.0.0.weight (original layout)"
    )

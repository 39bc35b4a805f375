"""Finds the UNet's tensors in a file: their prefix and their layout (diffusers or original)."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sws_export.checkpoint.header import StoredTensor
from sws_export.checkpoint.other_models import recognize_extended_unet, recognize_other_model
from sws_export.errors import CheckpointError

Layout = Literal["diffusers", "ldm"]

# Written by: diffusers; the original trainer; ComfyUI's savers (two); pipelines saved to one file.
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "unet.")
# Written by Lightning, DistributedDataParallel, torch.compile and PEFT around the whole model.
_WRAPPERS = ("state_dict.", "module.", "_orig_mod.", "base_model.model.")
# Written by torch.compile, FSDP and activation checkpointing around parts of a model.
_INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

# Tensors that every UNet of the layout has.
_REQUIRED_TENSORS: tuple[tuple[Layout, str, str], ...] = (
    ("ldm", "input_blocks.0.0.weight", "input_blocks.1.0.in_layers.0.weight"),
    ("diffusers", "conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
)

_EMA_PREFIX = "model_ema."
_EMA_OF_PREFIX = "model.diffusion_model."

_REASONS = (
    ("VAE", ("first_stage_model.", "vae.")),
    (
        "text or image encoder",
        ("cond_stage_model.", "conditioner.", "text_encoder", "embedder.", "image_encoder"),
    ),
    ("ControlNet", ("control_model.",)),
    ("EMA copy of the UNet (--ema uses it)", (_EMA_PREFIX,)),
)


@dataclass(frozen=True)
class UnetTensors:
    """The tensors of a UNet in a file.

    Attributes:
        layout: The layout of the names.
        stored: The UNet's tensors by their stored name without prefix.
        ignored: Number of other tensors in the file, by reason.
    """

    layout: Layout
    stored: dict[str, StoredTensor]
    ignored: dict[str, int]


def find_unet(path: Path, tensors: Mapping[str, StoredTensor], ema: bool) -> UnetTensors:
    """Select the UNet's tensors from `tensors`, or with `ema` their exponential moving averages.

    Raises:
        CheckpointError: The file contains no UNet, a model that extends one, or no EMA copy of it.
    """
    tensors = _unwrapped(tensors)
    found = _find_prefix(tensors)
    if found is None:
        raise CheckpointError(_no_unet_message(path, tensors))
    layout, prefix = found
    stored = {
        name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
    }
    # Without a prefix, every tensor of the file is selected; check_tensors counts those that are not used.
    what = recognize_extended_unet(stored)
    if what is not None:
        raise CheckpointError(f"{path} is {what}; expected a UNet2DConditionModel")
    if not ema:
        return UnetTensors(layout, stored, _count_ignored(tensors, prefix))
    averages = _ema_tensors(path, tensors, stored, prefix)
    return UnetTensors(layout, averages, _count_ignored(tensors, _EMA_PREFIX))


def _unwrapped(tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """The tensors without the prefixes of wrappers; two tensors that would have the same name keep theirs."""
    names = {name: _without_wrappers(name) for name in tensors}
    if len(set(names.values())) < len(names):
        return tensors
    return {names[name]: tensor for name, tensor in tensors.items()}


def _without_wrappers(name: str) -> str:
    while wrapper := next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), ""):
        name = name.removeprefix(wrapper)
    prefix = next((prefix for prefix in _PREFIXES if prefix and name.startswith(prefix)), "")
    rest = name.removeprefix(prefix)
    while wrapper := next((wrapper for wrapper in _WRAPPERS if rest.startswith(wrapper)), ""):
        rest = rest.removeprefix(wrapper)
    for wrapper in _INNER_WRAPPERS:
        rest = rest.replace(f".{wrapper}", ".")
    return prefix + rest


def _find_prefix(tensors: Mapping[str, StoredTensor]) -> tuple[Layout, str] | None:
    for prefix in _PREFIXES:
        for layout, *required in _REQUIRED_TENSORS:
            if all(prefix + name in tensors for name in required):
                return layout, prefix
    return None


def _ema_tensors(
    path: Path, tensors: Mapping[str, StoredTensor], stored: Mapping[str, StoredTensor], prefix: str
) -> dict[str, StoredTensor]:
    """The EMA copy, by the names in `stored`; the original trainer removes the dots from its names."""
    if prefix != _EMA_OF_PREFIX or not any(name.startswith(_EMA_PREFIX) for name in tensors):
        raise CheckpointError(f"{path} has no EMA weights (tensors named {_EMA_PREFIX}...); omit --ema")
    names = {name: _EMA_PREFIX + "diffusion_model" + name.replace(".", "") for name in stored}
    missing = [ema_name for ema_name in names.values() if ema_name not in tensors]
    if missing:
        raise CheckpointError(
            f"{path}: the EMA copy lacks {len(missing)} of {len(names)} tensors, first '{missing[0]}'; "
            "omit --ema"
        )
    return {name: tensors[ema_name] for name, ema_name in names.items()}


def _count_ignored(tensors: Mapping[str, StoredTensor], used: str) -> dict[str, int]:
    """Number of tensors without the prefix `used`, by the model they belong to."""
    counts = Counter(_reason(name, used) for name in tensors if not name.startswith(used))
    return dict(counts.most_common())


def _reason(name: str, used: str) -> str:
    if used == _EMA_PREFIX and name.startswith(_EMA_OF_PREFIX):
        return "weights that the EMA copy replaces"
    for reason, prefixes in _REASONS:
        if name.startswith(prefixes):
            return reason
    return "other" if "." in name else "noise schedule and training state"


def _no_unet_message(path: Path, tensors: Mapping[str, StoredTensor]) -> str:
    what = recognize_other_model(tensors)
    if what is not None:
        return f"{path} is {what}; expected a UNet2DConditionModel"
    names = list(tensors)[:3]
    shown = f" ({', '.join(names)}, ...)" if names else ""
    return (
        f"{path} contains no UNet2DConditionModel: its {len(tensors)} tensors{shown} include neither "
        "conv_in.weight with down_blocks (diffusers layout) nor input_blocks.0.0.weight (original layout)"
    )

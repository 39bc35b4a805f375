"""Low-rank adaptations (LoRA) of a checkpoint's UNet, fused tensor by tensor.

A LoRA replaces the weight W of a layer by W + scale · alpha / rank · up · down (Hu et al. 2021,
https://arxiv.org/abs/2106.09685). Nothing but headers is read before a fused tensor is asked for.
"""

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sws_export.checkpoint import Checkpoint, StoredTensor, read_tensor
from sws_export.checkpoint.header import read_header
from sws_export.errors import CheckpointError, OptionError
from sws_export.lora.names import LoraNames, read_names

if TYPE_CHECKING:
    import torch

_SHOWN = 3


@dataclass(frozen=True)
class LowRank:
    """The change of one weight: `factor` · up · down.

    `down` is [rank, in, ...] and `up` [out, rank, ...], where a convolution has its kernel in `down`.
    """

    down: StoredTensor
    up: StoredTensor
    factor: float


@dataclass(frozen=True)
class Lora:
    """A LoRA file matched with a UNet.

    Attributes:
        path: The file.
        scale: The strength the user gave.
        changes: Diffusers' name of a weight -> its change.
        unmatched: Layers that the LoRA changes and the UNet does not have.
        ignored: Tensors for other models: reason and number.
    """

    path: Path
    scale: float
    changes: dict[str, LowRank]
    unmatched: tuple[str, ...]
    ignored: dict[str, int]

    def sha256(self) -> str:
        """The sha256, in hex, of the file."""
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def parse_lora(text: str) -> tuple[Path, float]:
    """Split `FILE[:SCALE]`; the scale is 1 where it is left out.

    Raises:
        OptionError: The scale is no finite number.
    """
    file, colon, scale = text.rpartition(":")
    if not colon or scale.endswith(".safetensors"):
        return Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise OptionError(f"--lora {text}: expected FILE or FILE:SCALE with a number, found '{scale}'")
    return Path(file), value


def open_lora(path: Path, checkpoint: Checkpoint, scale: float = 1.0) -> Lora:
    """Match the LoRA in `path` (diffusers', PEFT's or kohya's names) with the UNet of `checkpoint`.

    Raises:
        CheckpointError: The file is no LoRA of a kind that is supported, or was made for another family.
    """
    if path.suffix.lower() != ".safetensors":
        raise CheckpointError(
            f"{path}: only .safetensors LoRAs are read (pickles execute code); convert it first"
        )
    header = read_header(path)
    weights = {name: tensor.shape for name, tensor in checkpoint.tensors.items() if name.endswith(".weight")}
    names = read_names(path, header, weights, checkpoint.config["layers_per_block"])
    changes = {
        weight: _low_rank(path, weight, weights[weight], layer, names, header.tensors, scale)
        for layer, weight in names.matched.items()
    }
    if not changes:
        raise CheckpointError(
            f"{path} changes no layer of {checkpoint.path} ({checkpoint.family or 'unknown family'}); its "
            f"{len(names.unmatched)} layers have other names ({_some(names.unmatched)}): "
            "use a LoRA for this family"
        )
    return Lora(path, scale, changes, names.unmatched, dict(Counter(names.ignored).most_common()))


def _low_rank(
    path: Path,
    weight: str,
    shape: tuple[int, ...],
    layer: str,
    names: LoraNames,
    tensors: Mapping[str, StoredTensor],
    scale: float,
) -> LowRank:
    down, up = tensors[names.down[layer]], tensors[names.up[layer]]
    rank = down.shape[0] if down.shape else 0
    fits = (
        len(down.shape) >= 2
        and len(up.shape) >= 2
        and rank > 0
        and up.shape[1] == rank
        and math.prod(up.shape[2:]) == 1
        and up.shape[0] == shape[0]
        and math.prod(down.shape[1:]) == math.prod(shape[1:])
    )
    if not fits:
        raise CheckpointError(
            f"{path} was made for another family: '{weight}' is {list(shape)} in the UNet, the LoRA has "
            f"{list(up.shape)} × {list(down.shape)}; use a LoRA for this family"
        )
    return LowRank(down, up, scale * names.factor(layer, rank, tensors))


def fuse(checkpoint: Checkpoint, loras: Sequence[Lora]) -> dict[str, "Callable[[], torch.Tensor]"]:
    """For each weight that `loras` change, a function that reads and computes it.

    The function returns a float32 tensor in the shape of the weight, not rounded to the checkpoint's
    dtype, and raises CheckpointError if NaN or Inf comes out.
    """
    changes: dict[str, list[tuple[Lora, LowRank]]] = {}
    for lora in loras:
        for name, change in lora.changes.items():
            changes.setdefault(name, []).append((lora, change))
    return {
        name: functools.partial(_fused, name, checkpoint.tensors[name], parts)
        for name, parts in changes.items()
    }


def _fused(name: str, stored: StoredTensor, parts: list[tuple[Lora, LowRank]]) -> "torch.Tensor":
    weight = read_tensor(stored).float()
    for lora, change in parts:
        up, down = read_tensor(change.up).float(), read_tensor(change.down).float()
        delta = up.flatten(1) @ down.flatten(1)
        weight.add_(delta.reshape(weight.shape), alpha=change.factor)
        if not bool(weight.isfinite().all()):
            raise CheckpointError(f"{lora.path}: '{name}' holds NaN or Inf after fusing; the LoRA is broken")
    return weight


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")

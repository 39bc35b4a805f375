"""Fuses low-rank adaptations (LoRA) into the weights of a checkpoint's UNet, tensor by tensor.

A LoRA replaces the weight W of a layer by W + scale · alpha / rank · up · down (Hu et al. 2021,
https://arxiv.org/abs/2106.09685). Opening a LoRA reads its header; tensors are read when a weight is fused.
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
from sws_export.errors import CheckpointError, OptionError, first_items
from sws_export.lora.names import LoraNames, read_names

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LowRank:
    """The change of one weight: `factor` · up · down.

    Attributes:
        down: [rank, in] of a linear layer, [rank, in, height, width] of a convolution.
        up: [out, rank] of a linear layer, [out, rank, 1, 1] of a convolution.
        factor: scale · alpha / rank.
    """

    down: StoredTensor
    up: StoredTensor
    factor: float


@dataclass(frozen=True)
class Lora:
    """A LoRA file matched with a UNet.

    Attributes:
        path: The file.
        scale: Strength given by the user.
        changes: Change of each weight, by diffusers' parameter name.
        unmatched: Layers of the LoRA that the UNet does not have.
        ignored: Number of tensors that are not used, by reason.
    """

    path: Path
    scale: float
    changes: dict[str, LowRank]
    unmatched: tuple[str, ...]
    ignored: dict[str, int]

    def sha256(self) -> str:
        """The hexadecimal sha256 of the file."""
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def parse_lora(text: str) -> tuple[Path, float]:
    """Split `FILE[:SCALE]`; the default scale is 1.

    Raises:
        OptionError: The scale is not a finite number.
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
    """Match the LoRA in `path` (names of diffusers, PEFT or kohya) with the UNet of `checkpoint`.

    Raises:
        CheckpointError: The file is not a supported LoRA, or belongs to a model of another family.
    """
    if path.suffix.lower() != ".safetensors":
        raise CheckpointError(
            f"{path}: only .safetensors LoRAs are supported (loading a pickle executes code); convert it"
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
            f"{path} changes no layer of {checkpoint.path} ({checkpoint.family or 'unknown family'}): its "
            f"{len(names.unmatched)} layers have other names ({first_items(names.unmatched)}); "
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
            f"{path} belongs to another family: '{weight}' has shape {list(shape)} in the UNet, the LoRA's "
            f"factors have shapes {list(up.shape)} and {list(down.shape)}; use a LoRA for this family"
        )
    return LowRank(down, up, scale * names.factor(layer, rank, tensors))


def fuse(checkpoint: Checkpoint, loras: Sequence[Lora]) -> dict[str, "Callable[[], torch.Tensor]"]:
    """For each weight that `loras` change, a function that reads and computes it.

    The function returns a float32 tensor in the shape of the weight, not rounded to the checkpoint's
    dtype, and raises CheckpointError if the result contains NaN or Inf.
    """
    changes: dict[str, list[tuple[Lora, LowRank]]] = {}
    for lora in loras:
        for name, change in lora.changes.items():
            changes.setdefault(name, []).append((lora, change))
    return {
        name: functools.partial(_fused, name, checkpoint.tensors[name], of_weight)
        for name, of_weight in changes.items()
    }


def _fused(name: str, stored: StoredTensor, changes: list[tuple[Lora, LowRank]]) -> "torch.Tensor":
    weight = read_tensor(stored).float()
    for lora, change in changes:
        up, down = read_tensor(change.up).float(), read_tensor(change.down).float()
        delta = up.flatten(1) @ down.flatten(1)
        weight.add_(delta.reshape(weight.shape), alpha=change.factor)
        if not bool(weight.isfinite().all()):
            raise CheckpointError(
                f"{lora.path}: '{name}' contains NaN or Inf after fusing; the LoRA is broken"
            )
    return weight

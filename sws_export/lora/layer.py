"""The tensors of a LoRA for one layer of a UNet."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sws_export.checkpoint import StoredTensor, read_tensor
from sws_export.lora.peft_config import PeftConfig

if TYPE_CHECKING:
    import torch


def _read(stored: StoredTensor) -> "torch.Tensor":
    return read_tensor(stored).float()


def read_shape(stored: StoredTensor) -> "torch.Tensor":
    """A tensor of the same shape on the meta device; scalars are read."""
    import torch

    return _read(stored) if math.prod(stored.shape) == 1 else torch.empty(stored.shape, device="meta")


@dataclass(frozen=True)
class LoraLayer:
    """The tensors of a LoRA for one layer, by role.

    Attributes:
        name: diffusers' name of the layer.
        stored: Stored tensors by role.
        peft: PEFT's configuration of the adapter, or None.
        read: Reads a tensor in float32.
    """

    name: str
    stored: Mapping[str, StoredTensor]
    peft: PeftConfig | None
    read: "Callable[[StoredTensor], torch.Tensor]" = _read

    def __contains__(self, role: str) -> bool:
        return role in self.stored

    def __getitem__(self, role: str) -> "torch.Tensor":
        return self.read(self.stored[role])

    def factor(self, rank: int) -> float:
        """alpha / rank; 1 without alpha."""
        if "alpha" in self.stored:
            return self._alpha() / rank
        return self.peft.scaling(self.name, rank) if self.peft is not None else 1.0

    def constraint(self) -> float:
        """The constraint of OFT, which LyCORIS stores as alpha; 0 without one."""
        return self._alpha() if "alpha" in self.stored else 0.0

    def _alpha(self) -> float:
        return float(self["alpha"].reshape(-1)[0])

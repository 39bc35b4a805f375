"""What is known about a checkpoint before any weight is read."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sws_export.checkpoint.header import StoredTensor
from sws_export.checkpoint.layouts import Layout
from sws_export.checkpoint.ldm import diffusers_names


@dataclass(frozen=True)
class Checkpoint:
    """A UNet on disk: its configuration and where each of its tensors lies.

    Attributes:
        path: What the user named.
        files: The files that hold the weights, in the order of their names.
        config: A complete configuration of diffusers' UNet2DConditionModel.
        config_source: Where the configuration comes from, for the log.
        family: Name of the known architecture ("SD 1.x", "SDXL base", ...), or None.
        layout: How the stored tensors are named.
        stored: The UNet's tensors under their stored names, without a prefix.
        ignored: Tensors of the files that are not used: reason and number.
        vae_scale: Pixels a latent value covers in each direction, 1 in pixel space, None if unknown.
        prediction_type: "epsilon", "v_prediction", ... where the checkpoint says so, or None.
        remarks: What a user should know about how the checkpoint was read.
    """

    path: Path
    files: tuple[Path, ...]
    config: dict[str, Any]
    config_source: str
    family: str | None
    layout: Layout
    stored: dict[str, StoredTensor]
    ignored: dict[str, int]
    vae_scale: int | None
    prediction_type: str | None
    remarks: tuple[str, ...] = ()

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The UNet's tensors under diffusers' parameter names.

        Raises:
            CheckpointError: The layout's names cannot be converted with this configuration.
        """
        if self.layout == "diffusers":
            return self.stored
        return {name: self.stored[ldm] for name, ldm in diffusers_names(self.stored, self.config).items()}

    @property
    def parameters(self) -> int:
        """Number of parameters of the UNet."""
        return sum(math.prod(tensor.shape) for tensor in self.stored.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the UNet's weights on disk."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Bytes a stored dtype, the largest share first."""
        shares: Counter[str] = Counter()
        for tensor in self.stored.values():
            shares[tensor.dtype] += tensor.nbytes
        return dict(shares.most_common())

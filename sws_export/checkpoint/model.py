"""The description of a checkpoint that is known before any weight is read."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sws_export.checkpoint.header import StoredTensor
from sws_export.checkpoint.layouts import Layout
from sws_export.checkpoint.ldm import diffusers_names
from sws_export.checkpoint.prediction import Prediction


@dataclass(frozen=True)
class Checkpoint:
    """A UNet on disk: its configuration and the location of each of its tensors.

    Attributes:
        path: The path given by the user.
        files: The weight files, sorted by name.
        config: A complete configuration of diffusers' UNet2DConditionModel.
        config_source: Where the configuration comes from, for the log.
        family: Name of the known architecture ("SD 1.x", "SDXL base", ...), or None.
        layout: The layout of the stored names.
        stored: The UNet's tensors by their stored name without prefix.
        ignored: Number of tensors in the files that are not used, by reason.
        vae_scale: Pixels for each latent element along height and width, 1 in pixel space, None if unknown.
        prediction: What the UNet predicts.
        remarks: Notes for the user on how the checkpoint was read.
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
    prediction: Prediction
    remarks: tuple[str, ...] = ()

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The UNet's tensors by diffusers' parameter names.

        Raises:
            CheckpointError: The names cannot be converted with this configuration.
        """
        if self.layout == "diffusers":
            return self.stored
        return {name: self.stored[ldm] for name, ldm in diffusers_names(self.stored, self.config).items()}

    @property
    def parameter_count(self) -> int:
        """Number of parameters of the UNet."""
        return sum(math.prod(tensor.shape) for tensor in self.stored.values())

    @property
    def nbytes(self) -> int:
        """Size of the UNet's weights on disk in bytes."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Size in bytes by stored dtype, in descending order."""
        sizes: Counter[str] = Counter()
        for tensor in self.stored.values():
            sizes[tensor.dtype] += tensor.nbytes
        return dict(sizes.most_common())

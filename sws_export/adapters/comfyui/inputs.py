"""Inputs of an exported UNet from the arguments of a ComfyUI diffusion model."""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sws_export.errors import StepError
from sws_export.runtime.inputs import to_numpy
from sws_export.tensors import DOWN_RESIDUAL, MID_RESIDUAL

if TYPE_CHECKING:
    import torch

_POOLED = 1280
_EMBEDDING = 256
_LARGEST_SIZE = 8192
_RESOLUTION = 0.5


def control_residuals(control: Mapping[str, Any] | None, names: Collection[str], file: str) -> dict[str, Any]:
    """The residuals of a ControlNet under the names of the graph's inputs.

    ComfyUI's `output` list has the residuals of the input blocks in the order of the blocks, and of `middle`
    it uses the last entry; those that a ControlNet does not have are None.

    Args:
        control: What ComfyUI passes as `control`; the lists are not changed.
        names: Inputs of the graph.
        file: Name of the artefact, for messages.

    Raises:
        StepError: The graph has no inputs for residuals, or has too few, or the residuals are those of a T2I
            adapter.
    """
    given = {
        name: [tensor for tensor in tensors or () if tensor is not None]
        for name, tensors in (control or {}).items()
    }
    if given.get("input"):
        raise StepError(
            "a T2I adapter adds its residuals to the input blocks, and the exported graph has inputs for the "
            "residuals of a ControlNet only; use a ControlNet, or the torch model"
        )
    residuals = {
        f"{DOWN_RESIDUAL}{index}": tensor
        for index, tensor in enumerate((control or {}).get("output") or ())
        if tensor is not None
    }
    if given.get("middle"):
        residuals[MID_RESIDUAL] = given["middle"][-1]
    if residuals and MID_RESIDUAL not in names:
        raise StepError(
            f"{file} has no ControlNet inputs; export it with --controlnet, or remove the ControlNet from "
            "the workflow"
        )
    if unknown := [name for name in residuals if name not in names]:
        known = sum(name.startswith(DOWN_RESIDUAL) for name in names)
        raise StepError(
            f"the ControlNet has {len(unknown) + known} residuals of input blocks, {file} takes {known}: "
            "it is for another family of models"
        )
    return residuals


def ignored_patches(options: Mapping[str, Any]) -> list[str]:
    """Names of the patches in `transformer_options` that only a torch UNet can apply."""
    found = [f"patches {name}" for name, patches in (options.get("patches") or {}).items() if patches]
    found += [
        f"patches_replace {name}"
        for name, patches in (options.get("patches_replace") or {}).items()
        if patches
    ]
    if options.get("optimized_attention_override") is not None:
        found.append("optimized_attention_override")
    wrappers = (options.get("wrappers") or {}).get("diffusion_model") or {}
    found += [f"wrapper {name}" for name, wrapped in wrappers.items() if wrapped]
    return found


def split_adm(y: "torch.Tensor") -> dict[str, Any]:
    """Recover SDXL's `text_embeds` and `time_ids` from the vector that ComfyUI builds from them.

    ComfyUI embeds each size n as cos and sin of n · 10000^(−i/128), i = 0…127. The size is recovered as the
    multiple of 0.5 with the most similar embedding, which is unambiguous in float16 too.

    Args:
        y: [B, 1280 + 256 N], any float dtype.

    Returns:
        `text_embeds` [B, 1280], a part of `y`, and `time_ids` [B, N], a float32 array.

    Raises:
        StepError: The width is not 1280 + 256 N.
    """
    count = count_sizes(y.shape)
    embedded = to_numpy(y[:, _POOLED:]).reshape(-1, _EMBEDDING).astype(np.float32)
    nearest = (embedded @ _size_embeddings().T).argmax(axis=1)
    time_ids = (nearest * np.float32(_RESOLUTION)).reshape(len(y), count)
    return {"text_embeds": y[:, :_POOLED], "time_ids": time_ids}


def count_sizes(shape: Sequence[Any]) -> int:
    """N of a `y` of shape [B, 1280 + 256 N].

    Raises:
        StepError: The width is another one.
    """
    width = shape[1]
    count, rest = divmod(width - _POOLED, _EMBEDDING) if isinstance(width, int) else (0, 0)
    if rest or count < 1:
        raise StepError(f"y: expected [B, {_POOLED} + {_EMBEDDING} N], found {list(shape)}")
    return count


@functools.cache
def _size_embeddings() -> npt.NDArray[np.float32]:
    """Embedding of 0, 0.5, 1 … 8192, all of the same length, [16385, 256]."""
    return embed_sizes(np.arange(0, _LARGEST_SIZE + _RESOLUTION, _RESOLUTION))


def embed_sizes(sizes: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The embedding of latent-diffusion's `timestep_embedding` of numbers [N], as [N, 256]."""
    half = _EMBEDDING // 2
    rates = 10000.0 ** (-np.arange(half) / half)
    angles = np.asarray(sizes, np.float64)[:, None] * rates
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

"""The UNet as a torch module: built from a config, called with the contract's inputs."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sws_export.checkpoint import Checkpoint, FusedWeights, read_tensor
from sws_export.contract import DOWN_RESIDUAL, DTYPE_NAMES, Precision
from sws_export.errors import CheckpointError

_ADDED_CONDITIONS = ("text_embeds", "time_ids")


def build_unet(config: Mapping[str, Any], precision: Precision) -> UNet2DConditionModel:
    """An untrained UNet in evaluation mode whose parameters have the dtype of `precision`.

    On the `meta` device this takes no memory for weights.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, DTYPE_NAMES[precision]))
    try:
        return UNet2DConditionModel.from_config(dict(config)).eval()
    finally:
        torch.set_default_dtype(default)


def load_unet(
    checkpoint: Checkpoint, dtype: torch.dtype, fused: FusedWeights | None = None
) -> UNet2DConditionModel:
    """The UNet with its weights in memory, converted tensor by tensor to `dtype`.

    Weights in `fused` take the place of stored ones.

    Raises:
        CheckpointError: A tensor is missing or cannot be read.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(checkpoint.config)).eval()
    weights = {}
    for name in unet.state_dict():
        if name not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing")
        read = (fused or {}).get(name) or functools.partial(read_tensor, checkpoint.tensors[name])
        weights[name] = read().to(dtype)
    unet.load_state_dict(weights, assign=True)
    return unet


def call_unet(unet: UNet2DConditionModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The prediction of `unet` for inputs named as in the contract."""
    prediction: torch.Tensor = unet(**unet_arguments(inputs), return_dict=False)[0]
    return prediction


def unet_arguments(inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Inputs of the contract as arguments of diffusers' `forward`.

    Pooled text embeddings and time ids are widened to float32 at least: diffusers concatenates them with
    float32 time embeddings, which torch promotes by itself and the ONNX exporter does not.
    """
    residuals = [inputs[name] for name in sorted(inputs, key=_residual_number) if _is_residual(name)]
    arguments: dict[str, Any] = {
        name: value
        for name, value in inputs.items()
        if name not in _ADDED_CONDITIONS and not _is_residual(name)
    }
    if residuals:
        arguments["down_block_additional_residuals"] = tuple(residuals)
    added = {
        name: inputs[name].to(torch.promote_types(inputs[name].dtype, torch.float32))
        for name in _ADDED_CONDITIONS
        if name in inputs
    }
    if added:
        arguments["added_cond_kwargs"] = added
    return arguments


def _is_residual(name: str) -> bool:
    return name.startswith(DOWN_RESIDUAL)


def _residual_number(name: str) -> int:
    return int(name.removeprefix(DOWN_RESIDUAL)) if _is_residual(name) else -1

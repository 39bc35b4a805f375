"""The UNet as a torch module: built from a configuration, called with the exported graph's inputs."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sws_export.checkpoint import Checkpoint, FusedWeights, read_tensor
from sws_export.checkpoint.ip_adapter import unet_from_config
from sws_export.errors import CheckpointError
from sws_export.tensors import DOWN_RESIDUAL, PRECISIONS, Precision

_ADDED_CONDITIONS = ("text_embeds", "time_ids")


def build_unet(config: Mapping[str, Any], precision: Precision) -> UNet2DConditionModel:
    """A UNet in evaluation mode with untrained parameters in the dtype of `precision`."""
    return _untrained_unet(config, getattr(torch, PRECISIONS[precision].dtype))


def _untrained_unet(config: Mapping[str, Any], dtype: torch.dtype) -> UNet2DConditionModel:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return unet_from_config(config).eval()
    finally:
        torch.set_default_dtype(default)


def load_unet(
    checkpoint: Checkpoint, dtype: torch.dtype, fused: FusedWeights | None = None
) -> UNet2DConditionModel:
    """The UNet with its weights in memory, converted to `dtype`.

    Weights in `fused` replace stored ones.

    Raises:
        CheckpointError: A tensor is missing or cannot be read.
    """
    unet, readers = _empty_unet(checkpoint, dtype, fused)
    unet.load_state_dict({name: read() for name, read in readers.items()}, assign=True)
    return unet


def stream_unet(
    checkpoint: Checkpoint, dtype: torch.dtype, fused: FusedWeights | None = None
) -> UNet2DConditionModel:
    """As `load_unet`, but linear layers and convolutions hold their weight in memory only while they run.

    They read it again at each call, so peak memory is that of the largest layer instead of the model's.
    """
    unet, readers = _empty_unet(checkpoint, dtype, fused)
    for path, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            _read_when_run(layer, readers.pop(f"{path}.weight"))
    unet.load_state_dict({name: read() for name, read in readers.items()}, strict=False, assign=True)
    return unet


def _empty_unet(
    checkpoint: Checkpoint, dtype: torch.dtype, fused: FusedWeights | None
) -> tuple[UNet2DConditionModel, dict[str, Callable[[], torch.Tensor]]]:
    """The UNet on the meta device, and for each tensor a function that reads and converts it."""
    with torch.device("meta"):
        unet = _untrained_unet(checkpoint.config, dtype)
    readers: dict[str, Callable[[], torch.Tensor]] = {}
    for name in unet.state_dict():
        if name not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing")
        read = (fused or {}).get(name) or functools.partial(read_tensor, checkpoint.tensors[name])
        readers[name] = functools.partial(_converted, read, dtype)
    return unet, readers


def _converted(read: Callable[[], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return read().to(dtype)


def _read_when_run(layer: torch.nn.Linear | torch.nn.Conv2d, read: Callable[[], torch.Tensor]) -> None:
    meta_weight = layer.weight

    def load(*_: object) -> None:
        layer.weight = torch.nn.Parameter(read(), requires_grad=False)

    def release(*_: object) -> None:
        layer.weight = meta_weight

    layer.register_forward_pre_hook(load)
    layer.register_forward_hook(release, always_call=True)


def call_unet(unet: UNet2DConditionModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The prediction of `unet` for inputs by their names in the exported graph."""
    prediction: torch.Tensor = unet(**unet_arguments(inputs), return_dict=False)[0]
    return prediction


def unet_arguments(inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Inputs of the exported graph as arguments of diffusers' `forward`.

    Pooled text embeddings and time ids are converted to float32 or wider: diffusers concatenates them with
    float32 time embeddings, and the graph must convert them explicitly.
    """
    images = [inputs[name] for name in sorted(inputs, key=_number_of) if _is_image(name)]
    residuals = [inputs[name] for name in sorted(inputs, key=_number_of) if _is_residual(name)]
    arguments: dict[str, Any] = {
        name: value
        for name, value in inputs.items()
        if name not in _ADDED_CONDITIONS and not _is_residual(name) and not _is_image(name)
    }
    if residuals:
        arguments["down_block_additional_residuals"] = tuple(residuals)
    added: dict[str, Any] = {
        name: inputs[name].to(torch.promote_types(inputs[name].dtype, torch.float32))
        for name in _ADDED_CONDITIONS
        if name in inputs
    }
    if images:
        added["image_embeds"] = images
    if added:
        arguments["added_cond_kwargs"] = added
    return arguments


def _is_residual(name: str) -> bool:
    return name.startswith(DOWN_RESIDUAL)


def _is_image(name: str) -> bool:
    return name.startswith("image_embeds")


def _number_of(name: str) -> int:
    """The number at the end of the name of a residual or image embedding, for sorting."""
    last = name.rpartition("_")[2]
    return int(last) if last.isdigit() else -1

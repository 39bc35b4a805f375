"""The UNet as a torch module: built from a config, called with the contract's inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sws_export.contract import DTYPE_NAMES, Precision

_ADDED_CONDITIONS = ("text_embeds", "time_ids")


def build_unet(config: Mapping[str, Any], precision: Precision) -> UNet2DConditionModel:
    """An untrained UNet in evaluation mode whose parameters have the dtype of `precision`.

    Under `FakeTensorMode` or on the `meta` device this takes no memory for weights.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, DTYPE_NAMES[precision]))
    try:
        return UNet2DConditionModel.from_config(dict(config)).eval()
    finally:
        torch.set_default_dtype(default)


class UNetStep(torch.nn.Module):
    """One denoising step with positional inputs, in the order of the contract."""

    def __init__(self, unet: UNet2DConditionModel, names: Sequence[str]) -> None:
        super().__init__()
        self.unet = unet
        self.names = tuple(names)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The prediction for `inputs`, named by `names`."""
        return call_unet(self.unet, dict(zip(self.names, inputs, strict=True)))


def call_unet(unet: UNet2DConditionModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The prediction of `unet` for inputs named as in the contract.

    Pooled text embeddings are widened to float32: diffusers concatenates them with float32 time
    embeddings, which torch promotes by itself and the ONNX exporter does not.
    """
    arguments: dict[str, Any] = {
        name: value for name, value in inputs.items() if name not in _ADDED_CONDITIONS
    }
    added = {name: inputs[name].float() for name in _ADDED_CONDITIONS if name in inputs}
    if added:
        arguments["added_cond_kwargs"] = added
    (prediction,) = unet(**arguments, return_dict=False)
    return torch.as_tensor(prediction)

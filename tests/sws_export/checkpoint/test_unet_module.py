"""The UNet that reads each weight while its layer runs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sws_export.checkpoint import open_checkpoint
from sws_export.checkpoint.unet_module import call_unet, load_unet, stream_unet

INPUTS = {
    "sample": torch.linspace(-1, 1, 2 * 4 * 8 * 6).view(2, 4, 8, 6),
    "timestep": torch.tensor([500.0, 300.0]),
    "encoder_hidden_states": torch.linspace(-1, 1, 2 * 3 * 16).view(2, 3, 16),
}


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) for name, value in INPUTS.items()}


def weights_in_memory(unet: torch.nn.Module) -> list[str]:
    return [
        name
        for name, value in unet.named_parameters()
        if not value.is_meta and value.ndim > 1 and name.endswith(".weight")
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_streamed_unet_computes_what_the_loaded_one_does(random_unet: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(random_unet)
    streamed = stream_unet(checkpoint, dtype)
    expected = call_unet(load_unet(checkpoint, dtype), inputs(dtype))
    for _ in range(2):
        assert torch.equal(call_unet(streamed, inputs(dtype)), expected)


@torch.no_grad()
def test_fused_weights_replace_stored_ones(random_unet: Path) -> None:
    checkpoint = open_checkpoint(random_unet)
    fused = {name: lambda: torch.zeros(4, 32, 3, 3) for name in ("conv_out.weight",)}
    out = call_unet(stream_unet(checkpoint, torch.float32, fused), INPUTS)
    bias = load_unet(checkpoint, torch.float32).conv_out.bias
    assert torch.equal(out, bias[None, :, None, None].expand_as(out))


@torch.no_grad()
def test_one_matrix_is_in_memory_at_a_time(random_unet: Path) -> None:
    unet = stream_unet(open_checkpoint(random_unet), torch.float32)
    assert weights_in_memory(unet) == []
    seen: list[list[str]] = []

    def look(*_: Any) -> None:
        seen.append(weights_in_memory(unet))

    layers = [module for module in unet.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    for layer in layers:
        layer.register_forward_pre_hook(look)
    call_unet(unet, INPUTS)
    assert len(seen) >= len(layers)
    assert all(len(names) == 1 for names in seen)
    assert weights_in_memory(unet) == []


@torch.no_grad()
def test_a_layer_that_fails_releases_its_weight(random_unet: Path) -> None:
    unet = stream_unet(open_checkpoint(random_unet), torch.float32)
    with pytest.raises(RuntimeError):
        unet.conv_in(torch.zeros(1, 5, 8, 8))
    assert unet.conv_in.weight.is_meta

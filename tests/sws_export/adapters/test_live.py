"""SWS in a live UNet: one attention site against the eager reference, and the calls of a run."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sws_export.adapters.live import STEP_OPTION, LiveShuffle, self_attention
from sws_export.adapters.live_transport import Transport
from sws_export.parameters import SwsParameters
from sws_export.reference import (
    attention_site,
    blend_weights,
    blended_transport,
    dense_from_band,
    momentum,
    schedule,
)

HEADS, SIZE = 2, 8
SIGMAS = (9.0, 1.5, 0.3)
DEFAULT = SwsParameters()
# Budgets that are never and always exceeded, and one that is in between.
BUDGETS = {"default": DEFAULT, "none": SwsParameters(kl_floor=0.0, kl_slope=0.0)} | {
    f"{budget:g}": SwsParameters(kl_floor=budget, kl_slope=0.0) for budget in (2e-3, 2e-4)
}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(tokens: int, peak: float = 2.0, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that differ in how peaked they are, and keys that are alike where they are near."""
    q, k, v = (draw(batch, tokens, HEADS * SIZE, seed=seed) for seed in range(3))
    return q * torch.linspace(0.1, peak, tokens)[:, None], k + 0.3, v


def reference(
    grid: tuple[int, int], parameters: SwsParameters, intensity: float, values: tuple[Tensor, ...]
) -> Iterator[Tensor]:
    """The outputs of the reference in the dtype of the values at each noise level, [B, T, C]."""
    split = [x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in values]
    batch, previous = len(values[0]), torch.zeros(())
    strength = torch.full((batch,), intensity, dtype=torch.float64)
    for sigma in SIGMAS:
        now = schedule(torch.full((batch,), sigma, dtype=torch.float64), strength, parameters)
        previous = momentum(previous, blended_transport(now.u, *grid, parameters), parameters)
        found = attention_site(*split, previous, now, strength, parameters)
        yield found.out.transpose(1, 2).flatten(2)


class Unet:
    """One self-attention, called as ComfyUI calls its UNet."""

    def __init__(self, values: tuple[Tensor, ...]) -> None:
        self.values = values
        self.calls: list[dict[str, Any]] = []

    def __call__(self, x: Tensor, *arguments: Any) -> Tensor:
        options = arguments[4] | {"n_heads": HEADS}
        self.calls.append(options)
        return self_attention(*(value[: len(x)] for value in self.values), options)


def doubled(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.double() for value in values)


def call(shuffle: LiveShuffle, unet: Unet, grid: tuple[int, int], sigma: float, batch: int = 2) -> Tensor:
    options = {"sigmas": torch.tensor([sigma]), "cond_or_uncond": [1, 0][:batch], "uuids": ["a", "b"][:batch]}
    return shuffle.call_unet(
        unet, torch.zeros(batch, 4, *grid), torch.zeros(batch), None, None, None, options
    )


@pytest.mark.parametrize(
    ("budget", "grid"),
    [("default", (24, 22)), ("0.002", (24, 22)), ("none", (5, 9)), ("0.0002", (5, 9)), ("default", (5, 9))],
)
def test_it_is_the_reference_in_float32(budget: str, grid: tuple[int, int]) -> None:
    values = qkv(math.prod(grid))
    unet, shuffle = Unet(values), LiveShuffle(1.0, BUDGETS[budget])
    plain = LiveShuffle(0.0)
    for sigma, expected in zip(SIGMAS, reference(grid, BUDGETS[budget], 1.0, doubled(values)), strict=True):
        found = call(shuffle, unet, grid, sigma)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (found - call(plain, unet, grid, sigma)).abs().max() > 1e-3


def test_it_is_the_reference_in_float16() -> None:
    grid = (24, 22)
    values = tuple(value.half() for value in qkv(math.prod(grid), peak=4.0))
    unet, shuffle = Unet(values), LiveShuffle(0.7)
    for sigma, expected in zip(SIGMAS, reference(grid, DEFAULT, 0.7, values), strict=True):
        found = call(shuffle, unet, grid, sigma)
        assert found.dtype == torch.float16
        assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
        assert (found - expected).float().norm() <= 1e-4 * expected.float().norm()


@pytest.mark.parametrize("peak", [0.01, 30.0])
def test_flat_and_peaked_rows(peak: float) -> None:
    """Logits of one value, and up to several hundred."""
    grid = (24, 22)
    values = qkv(math.prod(grid), peak)
    unet, shuffle = Unet(values), LiveShuffle(1.0)
    for sigma, expected in zip(SIGMAS, reference(grid, DEFAULT, 1.0, doubled(values)), strict=True):
        found = call(shuffle, unet, grid, sigma)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_transport_is_that_of_the_graph() -> None:
    grid, device = (9, 11), torch.device("cpu")
    previous, expected = None, torch.zeros(())
    x = draw(2, 99, 6, seed=1)
    for u in (0.1, 0.6):
        progress = torch.tensor([u], dtype=torch.float64)
        previous = Transport.of_step(previous, blend_weights(progress)[0], *grid, device, DEFAULT)
        expected = momentum(expected, blended_transport(progress, *grid, DEFAULT), DEFAULT)
        dense = dense_from_band(previous.band.view(1, -1, *grid))
        torch.testing.assert_close(dense.double(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(previous.apply(x), (expected @ x.double()).float(), rtol=0, atol=1e-5)


def test_each_condition_has_its_own_history_and_a_run_has_none() -> None:
    grid = (8, 8)
    unet, shuffle = Unet(qkv(64)), LiveShuffle(1.0)
    first = call(shuffle, unet, grid, 5.0)
    call(shuffle, unet, grid, 2.0, batch=1)
    together = call(shuffle, unet, grid, 1.0)
    alone = LiveShuffle(1.0)
    call(alone, unet, grid, 5.0)
    without = call(alone, unet, grid, 1.0)
    assert not torch.equal(together[0], without[0])
    torch.testing.assert_close(together[1], without[1])
    shuffle.clear()
    assert torch.equal(call(shuffle, unet, grid, 5.0), first)


def test_other_attention_is_plain() -> None:
    q, k, v = qkv(64)
    unet = Unet((q, k[:, :60], v[:, :60]))
    found = call(LiveShuffle(1.0), unet, (8, 8), 2.0)
    assert torch.equal(found, self_attention(*unet.values, {"n_heads": HEADS}))
    assert STEP_OPTION in unet.calls[0]
    assert STEP_OPTION not in (call(LiveShuffle(0.0), unet, (8, 8), 2.0), unet.calls[-1])[1]

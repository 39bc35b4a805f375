"""The reference on a diffusers UNet: exact bypass, state over steps, selected sites."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from graph_passes.parameters import SwsParameters
from sws_export.reference import (
    ReferenceUNet,
    attention_site,
    dense_from_band,
    schedule,
    self_attention_sites,
)

FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn1"
SIGMA = torch.tensor([6.0, 1.5])
INTENSITY = torch.tensor([0.5, 1.0])


def tiny_unet(dtype: torch.dtype = torch.float32, **config: Any) -> UNet2DConditionModel:
    """Three levels, attention on the first and the last; scaled queries, so that the attention is peaked."""
    torch.manual_seed(5)
    unet = UNet2DConditionModel(
        **{
            "sample_size": 12,
            "block_out_channels": (16, 16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 12,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            **config,
        }
    ).eval()
    with torch.no_grad():
        for site in self_attention_sites(unet):
            unet.get_submodule(site.path).to_q.weight *= 12
    return unet.to(dtype)


def inputs(dtype: torch.dtype = torch.float32, height: int = 10, width: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {
        "sample": torch.randn(2, 4, height, width, generator=generator).to(dtype),
        "timestep": torch.tensor([700.0, 40.0]),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator).to(dtype),
    }


def plain(unet: UNet2DConditionModel, **unet_inputs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = unet(**unet_inputs).sample
    return out


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return tiny_unet()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_intensity_zero_is_the_plain_unet_bit_for_bit(dtype: torch.dtype) -> None:
    unet = tiny_unet(dtype)
    reference = ReferenceUNet(unet, SwsParameters())
    state = None
    for _ in range(2):
        out, state = reference.step(**inputs(dtype), sigma=SIGMA, intensity=torch.zeros(2), state=state)
        assert torch.equal(out, plain(unet, **inputs(dtype)))
    out, _ = reference.step(**inputs(dtype), sigma=SIGMA, intensity=INTENSITY, state=state)
    assert (out - plain(unet, **inputs(dtype))).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_one_state_for_each_grid(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    reference = ReferenceUNet(tiny_unet(dtype), SwsParameters())
    out, state = reference.step(**inputs(dtype), sigma=SIGMA, intensity=INTENSITY)
    assert out.shape == (2, 4, 10, 7)
    assert out.dtype == dtype
    shapes = {name: tuple(band.shape) for name, band in state.items()}
    assert shapes == {"sws_state_d1": (2, 145, 10, 7), "sws_state_d4": (2, 145, 3, 2)}
    assert {band.dtype for band in state.values()} == {state_dtype}


def test_sites_and_their_grids(unet: UNet2DConditionModel) -> None:
    found = {site.path: site.grid.factor for site in self_attention_sites(unet)}
    assert found == {
        FIRST: 1,
        "down_blocks.2.attentions.0.transformer_blocks.0.attn1": 4,
        "up_blocks.0.attentions.0.transformer_blocks.0.attn1": 4,
        "up_blocks.0.attentions.1.transformer_blocks.0.attn1": 4,
        "up_blocks.2.attentions.0.transformer_blocks.0.attn1": 1,
        "up_blocks.2.attentions.1.transformer_blocks.0.attn1": 1,
        MIDDLE: 4,
    }
    reference = ReferenceUNet(unet, SwsParameters())
    reference.step(**inputs(), sigma=SIGMA, intensity=INTENSITY)
    assert reference.records.keys() == found.keys()


@pytest.mark.parametrize(("path", "grid"), [(FIRST, "sws_state_d1"), (MIDDLE, "sws_state_d4")])
def test_a_site_gets_its_projections_and_its_grid(path: str, grid: str) -> None:
    parameters = SwsParameters(kl_floor=1e-3, schedule="noise")
    unet = tiny_unet(torch.float64)
    attention = unet.get_submodule(path)
    projected: dict[str, Tensor] = {}
    for name in ("to_q", "to_k", "to_v"):
        attention.get_submodule(name).register_forward_hook(
            lambda _module, _arguments, out, name=name: projected.update(
                {name: out.view(2, out.shape[1], attention.heads, -1).transpose(1, 2)}
            )
        )
    reference = ReferenceUNet(unet, parameters)
    _, state = reference.step(**inputs(torch.float64), sigma=SIGMA, intensity=INTENSITY)
    now = schedule(SIGMA.double(), INTENSITY, parameters)
    transport = dense_from_band(state[grid])
    expected = attention_site(*projected.values(), transport, now, INTENSITY.double(), parameters)
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(reference.records[path], name), value)


def test_a_zero_state_equals_none(unet: UNet2DConditionModel) -> None:
    reference = ReferenceUNet(unet, SwsParameters())
    fresh = reference.step(**inputs(), sigma=SIGMA, intensity=INTENSITY)
    zeros = {name: torch.zeros_like(band) for name, band in fresh[1].items()}
    torch.testing.assert_close(
        reference.step(**inputs(), sigma=SIGMA, intensity=INTENSITY, state=zeros), fresh
    )


def test_state_is_carried_and_averaged(unet: UNet2DConditionModel) -> None:
    reference = ReferenceUNet(unet, SwsParameters())
    _, early = reference.step(**inputs(), sigma=torch.tensor([20.0, 20.0]), intensity=INTENSITY)
    fresh_out, fresh = reference.step(**inputs(), sigma=SIGMA, intensity=INTENSITY)
    out, carried = reference.step(**inputs(), sigma=SIGMA, intensity=INTENSITY, state=early)
    assert (out - fresh_out).abs().max() > 1e-4
    for name in fresh:
        # Rebalancing two nearly doubly-stochastic transports' average moves it little.
        average = 0.8 * early[name] + 0.2 * fresh[name]
        assert (carried[name] - average).abs().max() < 5e-3
        assert (carried[name] - fresh[name]).abs().max() > 5e-2


def test_a_batch_of_two_equals_two_single_runs() -> None:
    unet = tiny_unet(torch.float64)
    reference = ReferenceUNet(unet, SwsParameters(kl_floor=1e-4, kl_slope=1e-3))
    steps = [SIGMA, SIGMA * 0.8, SIGMA * 0.5]

    def run(members: slice) -> list[Tensor]:
        state, outs = None, []
        batch = {name: value[members] for name, value in inputs(torch.float64).items()}
        for sigma in steps:
            out, state = reference.step(
                **batch, sigma=sigma[members], intensity=INTENSITY[members], state=state
            )
            outs += [out, *state.values()]
        return outs

    together = run(slice(0, 2))
    for member in (slice(0, 1), slice(1, 2)):
        for both, alone in zip(together, run(member), strict=True):
            torch.testing.assert_close(both[member], alone, rtol=1e-9, atol=1e-11)


def test_a_small_budget_binds_at_every_site(unet: UNet2DConditionModel) -> None:
    parameters = SwsParameters(kl_floor=2e-5, kl_slope=0)
    reference = ReferenceUNet(unet, parameters)
    reference.step(**inputs(height=16, width=12), sigma=torch.tensor([6.0, 2.0]), intensity=INTENSITY)
    for path, record in reference.records.items():
        assert (record.alpha_k > 0).all(), path
        assert (record.alpha_k < 0.3 * record.amplitude * 126 / 128).all(), path
        assert (record.kl <= 2e-5).all(), path


def test_only_values_are_mixed_above_u_stop(unet: UNet2DConditionModel) -> None:
    reference = ReferenceUNet(unet, SwsParameters())
    reference.step(**inputs(), sigma=torch.tensor([3.0, 0.5]), intensity=INTENSITY)
    for path, record in reference.records.items():
        assert (record.alpha_k > 0).tolist() == [True, False], path
        assert (record.a_v > 0).all(), path
        assert not record.out.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sigma", [1e-4, 3.0, 1e4])
def test_low_precision_is_finite_at_the_extremes(dtype: torch.dtype, sigma: float) -> None:
    reference = ReferenceUNet(tiny_unet(dtype), SwsParameters())
    state = None
    for _ in range(2):
        out, state = reference.step(
            **inputs(dtype), sigma=torch.full((2,), sigma), intensity=torch.tensor([0.0, 1.0]), state=state
        )
        assert out.isfinite().all()
        assert all(band.isfinite().all() for band in state.values())


def test_float32_stays_near_float64() -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        reference, state = ReferenceUNet(tiny_unet(dtype), SwsParameters()), None
        for sigma in (SIGMA, SIGMA / 2):
            out, state = reference.step(**inputs(dtype), sigma=sigma, intensity=INTENSITY, state=state)
        results.append({"out": out.double(), **{name: band.double() for name, band in state.items()}})
    low, high = results
    for name, expected in high.items():
        tolerance = 1e-4 if name == "out" else 1e-5
        assert (low[name] - expected).abs().max() <= tolerance * expected.abs().max(), name


@pytest.mark.parametrize("choice", [[FIRST], {FIRST}, lambda path: path == FIRST])
def test_only_selected_sites_have_sws(unet: UNet2DConditionModel, choice: Any) -> None:
    reference = ReferenceUNet(unet, SwsParameters(), choice)
    _, state = reference.step(**inputs(), sigma=SIGMA, intensity=INTENSITY)
    assert reference.records.keys() == {FIRST}
    assert state.keys() == {"sws_state_d1"}


def test_the_processors_are_restored(unet: UNet2DConditionModel) -> None:
    before = dict(unet.attn_processors)
    reference = ReferenceUNet(unet, SwsParameters())
    reference.step(**inputs(), sigma=SIGMA, intensity=INTENSITY)
    assert unet.attn_processors == before
    with pytest.raises(RuntimeError):
        reference.step(
            **{**inputs(), "encoder_hidden_states": torch.zeros(2, 5, 13)}, sigma=SIGMA, intensity=INTENSITY
        )
    assert unet.attn_processors == before


def test_attention_on_pixels_with_norm_and_residual() -> None:
    unet = tiny_unet(
        down_block_types=("AttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    )
    reference = ReferenceUNet(unet, SwsParameters())
    assert "down_blocks.0.attentions.0" in {site.path for site in reference.sites}
    out, _ = reference.step(**inputs(), sigma=SIGMA, intensity=torch.zeros(2))
    assert torch.equal(out, plain(unet, **inputs()))
    reference.step(**inputs(), sigma=SIGMA, intensity=INTENSITY)
    assert (reference.records["down_blocks.0.attentions.0"].a_v > 0).all()


def test_blocks_with_only_cross_attention_have_no_self_attention_sites() -> None:
    unet = tiny_unet(only_cross_attention=(True, False, False), mid_block_only_cross_attention=False)
    found = {site.path for site in self_attention_sites(unet)}
    assert FIRST not in found
    assert MIDDLE in found


def test_further_inputs_reach_the_unet() -> None:
    unet = tiny_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32
    )
    reference = ReferenceUNet(unet, SwsParameters())
    added = {"text_embeds": torch.ones(2, 8), "time_ids": torch.ones(2, 6)}
    out, _ = reference.step(**inputs(), sigma=SIGMA, intensity=torch.zeros(2), added_cond_kwargs=added)
    assert torch.equal(out, plain(unet, **inputs(), added_cond_kwargs=added))

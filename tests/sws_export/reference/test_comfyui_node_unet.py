"""The reference of the ComfyUI node on a diffusers UNet: order of the sites and their shared state."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from graph_passes.parameters import SwsParameters
from sws_export.errors import ExportError
from sws_export.reference import (
    ComfyUINodeReferenceUNet,
    comfyui_node_schedule,
    comfyui_node_sites,
    fresh_transport,
    moving_average,
)

FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
TEXT = 12
SIGMA = torch.tensor([3.0, 3.0])
INTENSITY = torch.tensor([1.0, 1.0])


def tiny_unet(dtype: torch.dtype = torch.float64, **config: Any) -> UNet2DConditionModel:
    """Widths 8 and 16, text width 12; scaled queries, so that the attention is peaked."""
    torch.manual_seed(5)
    unet = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": TEXT,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            **config,
        }
    ).eval()
    with torch.no_grad():
        for path in comfyui_node_sites(unet):
            unet.get_submodule(path).to_q.weight *= 12
    return unet.to(dtype)


def inputs(dtype: torch.dtype = torch.float64, tokens: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {
        "sample": torch.randn(2, 4, 6, 8, generator=generator).to(dtype),
        "timestep": torch.tensor([700.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, tokens, TEXT, generator=generator).to(dtype),
    }


def plain(unet: UNet2DConditionModel, **unet_inputs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = unet(**unet_inputs).sample
    return out


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return tiny_unet()


def test_the_sites_are_the_cross_attention_modules(unet: UNet2DConditionModel) -> None:
    assert len(comfyui_node_sites(unet)) == 7
    assert {path.rpartition(".")[2] for path in comfyui_node_sites(unet)} == {"attn2"}


def test_blocks_with_cross_attention_twice_are_patched_once() -> None:
    unet = tiny_unet(only_cross_attention=True)
    assert {path.rpartition(".")[2] for path in comfyui_node_sites(unet)} == {"attn2"}


def test_sites_run_in_the_order_down_mid_up(unet: UNet2DConditionModel) -> None:
    reference = ComfyUINodeReferenceUNet(unet, SwsParameters())
    reference.step(**inputs(), sigma=SIGMA, intensity=INTENSITY)
    assert list(dict.fromkeys(path.partition("_")[0] for path in reference.records)) == ["down", "mid", "up"]
    assert reference.records.keys() == set(reference.sites)


def test_every_site_updates_the_shared_state(unet: UNet2DConditionModel) -> None:
    """Seven moving averages of the same transport, in execution order; the first has no previous state."""
    reference = ComfyUINodeReferenceUNet(unet, SwsParameters())
    _, state = reference.step(**inputs(), sigma=SIGMA, intensity=INTENSITY)
    fresh = fresh_transport(5, comfyui_node_schedule(SIGMA.double(), SwsParameters()).u, SwsParameters())
    expected = torch.zeros(5, 5).double()
    for _ in range(7):
        expected = moving_average(expected, fresh, SwsParameters())
    assert list(state) == ["sws_state_text"]
    torch.testing.assert_close(state["sws_state_text"], expected[None], rtol=1e-13, atol=0)
    _, later = reference.step(**inputs(), sigma=SIGMA, intensity=INTENSITY, state=state)
    for _ in range(7):
        expected = moving_average(expected, fresh, SwsParameters())
    torch.testing.assert_close(later["sws_state_text"], expected[None], rtol=1e-13, atol=0)


def test_a_site_projects_the_patched_inputs(unet: UNet2DConditionModel) -> None:
    """At sigma_max the patch changes nothing."""
    reference = ComfyUINodeReferenceUNet(unet, SwsParameters())
    out, state = reference.step(**inputs(), sigma=torch.full((2,), 25.0), intensity=INTENSITY)
    torch.testing.assert_close(out, plain(unet, **inputs()), rtol=1e-12, atol=1e-13)
    assert (state["sws_state_text"] == 0).all()


def test_intensity_zero_keeps_the_temperature_and_the_state(unet: UNet2DConditionModel) -> None:
    reference = ComfyUINodeReferenceUNet(unet, SwsParameters())
    _, state = reference.step(**inputs(), sigma=SIGMA, intensity=INTENSITY)
    out, kept = reference.step(**inputs(), sigma=SIGMA, intensity=torch.zeros(2), state=state)
    assert torch.equal(kept["sws_state_text"], state["sws_state_text"])
    assert (out - plain(unet, **inputs())).abs().max() > 1e-4
    # Dividing queries and keys by sqrt(tau) each is to scale the logits by 1 / tau.
    tau = float(comfyui_node_schedule(SIGMA.double(), SwsParameters()).tau)
    scaled = tiny_unet()
    for path in comfyui_node_sites(scaled):
        scaled.get_submodule(path).to_q.weight.data /= tau
    torch.testing.assert_close(out, plain(scaled, **inputs()), rtol=1e-10, atol=1e-12)


def test_only_selected_sites_are_patched(unet: UNet2DConditionModel) -> None:
    reference = ComfyUINodeReferenceUNet(unet, SwsParameters(), [FIRST])
    _, state = reference.step(**inputs(), sigma=SIGMA, intensity=INTENSITY)
    assert reference.records.keys() == {FIRST}
    fresh = fresh_transport(5, comfyui_node_schedule(SIGMA.double(), SwsParameters()).u, SwsParameters())
    assert torch.equal(state["sws_state_text"][0], fresh)


def test_a_zero_state_equals_none(unet: UNet2DConditionModel) -> None:
    reference = ComfyUINodeReferenceUNet(unet, SwsParameters())
    fresh = reference.step(**inputs(), sigma=SIGMA, intensity=INTENSITY)
    zeros = {"sws_state_text": torch.zeros(1, 5, 5)}
    torch.testing.assert_close(
        reference.step(**inputs(), sigma=SIGMA, intensity=INTENSITY, state=zeros), fresh
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sigma", [1e-4, 3.0, 1e4])
def test_low_precision_is_finite_at_the_extremes(dtype: torch.dtype, sigma: float) -> None:
    reference, state = ComfyUINodeReferenceUNet(tiny_unet(dtype), SwsParameters()), None
    for _ in range(2):
        out, state = reference.step(
            **inputs(dtype), sigma=torch.full((2,), sigma), intensity=INTENSITY, state=state
        )
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert state["sws_state_text"].dtype == torch.float32
        assert state["sws_state_text"].isfinite().all()


def test_float32_stays_near_float64() -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        reference, state = ComfyUINodeReferenceUNet(tiny_unet(dtype), SwsParameters()), None
        for sigma in (SIGMA, SIGMA / 2):
            out, state = reference.step(**inputs(dtype), sigma=sigma, intensity=INTENSITY, state=state)
        results.append((out.double(), state["sws_state_text"].double()))
    for low, high in zip(*results, strict=True):
        assert (low - high).abs().max() <= 1e-5 * high.abs().max()


def test_unsupported_arguments(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ExportError, match=r"no cross-attention at .*attn1"):
        ComfyUINodeReferenceUNet(unet, SwsParameters(), [FIRST.replace("attn2", "attn1")])
    with pytest.raises(ExportError, match="none selected"):
        ComfyUINodeReferenceUNet(unet, SwsParameters(), lambda _: False)
    reference = ComfyUINodeReferenceUNet(unet, SwsParameters())
    for state in ({"sws_state_d1": torch.zeros(1, 5, 5)}, {"sws_state_text": torch.zeros(1, 6, 6)}):
        with pytest.raises(ExportError, match="state"):
            reference.step(**inputs(), sigma=SIGMA, intensity=INTENSITY, state=state)

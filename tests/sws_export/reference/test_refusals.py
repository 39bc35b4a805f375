"""Errors of the reference for unsupported sites, states and inputs."""

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from graph_passes.parameters import SwsParameters
from sws_export.errors import ExportError
from sws_export.reference import ReferenceUNet

FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
INPUTS = {
    "sample": torch.zeros(2, 4, 6, 5),
    "timestep": torch.tensor([700.0, 40.0]),
    "encoder_hidden_states": torch.zeros(2, 3, 8),
    "sigma": torch.tensor([6.0, 1.5]),
    "intensity": torch.tensor([0.5, 1.0]),
}


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=1,
        norm_num_groups=2,
    ).eval()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            ["down_blocks.0.attn9"],
            r"sites: no attention at down_blocks\.0\.attn9; the UNet has down_blocks",
        ),
        (str.isupper, "sites: none selected; the UNet has down_blocks"),
        ([], "sites: none selected"),
    ],
)
def test_unknown_sites(
    unet: UNet2DConditionModel, choice: list[str] | Callable[[str], bool], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        ReferenceUNet(unet, SwsParameters(), choice)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("sws_state_d2"), "expected sws_state_d1, sws_state_d2, found sws_state_d1"),
        (
            lambda state: state.update(sws_state_d4=torch.zeros(1)),
            "found sws_state_d1, sws_state_d2, sws_state_d4",
        ),
        (
            lambda state: state.update(sws_state_d2=torch.zeros(1, 145, 3, 2)),
            r"state sws_state_d2: expected shape \[2, 145, 3, 3\], found \[1, 145, 3, 2\]",
        ),
    ],
)
def test_a_state_of_the_wrong_names_or_shape(
    unet: UNet2DConditionModel, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    reference = ReferenceUNet(unet, SwsParameters())
    _, state = reference.step(**INPUTS)
    change(state)
    with pytest.raises(ExportError, match=message):
        reference.step(**INPUTS, state=state)


def test_an_attention_mask_is_unsupported(unet: UNet2DConditionModel) -> None:
    reference = ReferenceUNet(unet, SwsParameters())
    with pytest.raises(ExportError, match=f"{FIRST}: attention masks are not supported"):
        reference.step(**INPUTS, attention_mask=torch.ones(2, 30))

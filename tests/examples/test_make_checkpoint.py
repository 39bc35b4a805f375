from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from examples.make_checkpoint import FAMILY_NAMES, family_config, write_checkpoint
from sws_export.checkpoint import open_checkpoint, verify_weights
from sws_export.checkpoint.families import FAMILIES
from sws_export.progress import SilentProgress
from tests.export_runs import check_names


@pytest.mark.parametrize(
    ("family", "layout"), [("tiny", "diffusers"), ("tiny-sd", "ldm"), ("sdxl-lcm", "ldm")]
)
def test_small_unets_are_complete_and_reproducible(family: str, layout: str, tmp_path: Path) -> None:
    config = family_config(family, small=True)
    first = write_checkpoint(tmp_path / "a" / "x.safetensors", config, layout)
    write_checkpoint(tmp_path / "a", config, "diffusers")
    checkpoint = open_checkpoint(first, tmp_path / "a" / "config.json")
    assert checkpoint.layout == layout
    assert check_names(checkpoint) == 0
    verify_weights(checkpoint, SilentProgress())
    second = write_checkpoint(tmp_path / "b" / "x.safetensors", config, layout)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_activations_are_plausible(dtype: str, tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, family_config("tiny"), dtype=dtype)
    unet = UNet2DConditionModel.from_config(family_config("tiny"))
    unet.load_state_dict(load_file(file))
    torch.manual_seed(0)
    with torch.no_grad():
        prediction = unet(torch.randn(2, 4, 16, 16), torch.tensor(500), torch.randn(2, 7, 768)).sample
    assert 0.1 < prediction.std() < 10


def test_every_name_is_a_row_of_the_table() -> None:
    rows = {family.name: family for family in FAMILIES}
    for family, name in FAMILY_NAMES.items():
        assert family_config(family) == rows[name].config()

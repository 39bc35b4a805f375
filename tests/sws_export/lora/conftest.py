"""Small UNets to which LoRAs are applied."""

from pathlib import Path

import pytest
import torch

from examples.make_checkpoint import family_config, write_checkpoint
from sws_export.checkpoint import Checkpoint, open_checkpoint, read_tensor
from sws_export.lora.fuse import Lora, fuse


def write_family(directory: Path, family: str) -> Checkpoint:
    """A UNet with the topology of `family` and few channels."""
    config = family_config(family, small=True)
    narrow = {
        "block_out_channels": [8 << level for level in range(len(config["block_out_channels"]))],
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
    }
    return open_checkpoint(write_checkpoint(directory, config | narrow, dtype="fp32"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_family(tmp_path_factory.mktemp("sd"), "tiny-sd")


def assert_parameters(checkpoint: Checkpoint, lora: Lora, expected: dict[str, torch.Tensor]) -> None:
    """Compare all parameters of the UNet, fused or not, with `expected`, to 1e-5."""
    fused = fuse(checkpoint, [lora])
    assert expected.keys() == checkpoint.tensors.keys()
    for name, stored in checkpoint.tensors.items():
        found = fused[name]() if name in fused else read_tensor(stored).float()
        assert found.dtype == torch.float32
        assert (found - expected[name]).abs().max() <= 1e-5, name

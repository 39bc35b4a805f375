import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sws_export.checkpoint import open_checkpoint, read_tensor, verify_weights
from sws_export.checkpoint.header import read_header
from sws_export.errors import CheckpointError
from sws_export.files import HashedCopy, file_digest
from sws_export.progress import SilentProgress

NAME = "down_blocks.0.resnets.0.conv1.weight"


def write_tiny(directory: Path, dtype: torch.dtype) -> Path:
    """Random weights over the zeros of the tiny UNet."""
    file = directory / "diffusion_pytorch_model.safetensors"
    torch.manual_seed(0)
    save_file({name: torch.randn(value.shape).to(dtype) for name, value in load_file(file).items()}, file)
    return file


class Counting(SilentProgress):
    """Records the progress of each stage."""

    def __init__(self) -> None:
        self.done: dict[str, float] = {}
        self.total: dict[str, float | None] = {}

    def stage(self, name: str, total: float | None = None) -> Any:
        self.done[name], self.total[name] = 0, total
        counting = self

        class _Stage:
            def __enter__(self) -> "_Stage":
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def advance(self, amount: float = 1.0) -> None:
                counting.done[name] += amount

        return _Stage()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]
)
def test_read_tensor_gives_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    # An odd byte in front, so that the offset is aligned to nothing.
    tensors = {
        "a": torch.tensor([1], dtype=torch.uint8),
        "b": torch.randn(3, 5).to(dtype),
        "c": torch.ones((), dtype=dtype),
    }
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    for name, stored in read_header(file).tensors.items():
        found = read_tensor(stored)
        assert found.dtype == tensors[name].dtype
        assert torch.equal(
            found.view(torch.uint8) if found.ndim else found,
            tensors[name].view(torch.uint8) if found.ndim else tensors[name],
        )


def test_read_tensor_of_a_file_that_was_cut(tiny_unet: Path) -> None:
    checkpoint = open_checkpoint(tiny_unet)
    with checkpoint.files[0].open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(CheckpointError, match="was truncated"):
        read_tensor(checkpoint.tensors["conv_out.weight"])


def test_hash_is_that_of_the_file_and_progress_is_complete(tiny_unet: Path) -> None:
    file = write_tiny(tiny_unet, torch.float16)
    progress = Counting()
    assert (
        verify_weights(open_checkpoint(tiny_unet), progress) == hashlib.sha256(file.read_bytes()).hexdigest()
    )
    assert progress.done == progress.total == {"check weights": file.stat().st_size}
    copy = HashedCopy(tiny_unet / "copy")
    found = verify_weights(open_checkpoint(tiny_unet), SilentProgress(), copy)
    copy.close()
    assert copy.path.read_bytes() == file.read_bytes()
    assert found == copy.sha256.hexdigest() == file_digest(file).sha256


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_found_and_placed(tiny_unet: Path, dtype: torch.dtype, value: float) -> None:
    file = write_tiny(tiny_unet, dtype)
    tensors = load_file(file)
    tensors[NAME][3, 2, 1, 0] = value
    save_file(tensors, file)
    kind = "NaN" if math.isnan(value) else "Inf"
    with pytest.raises(CheckpointError, match=rf"{NAME}' .* contains {kind} at index \[3, 2, 1, 0\]"):
        verify_weights(open_checkpoint(tiny_unet), SilentProgress())


def test_the_single_nan_of_e4m3_is_found(tiny_unet: Path) -> None:
    file = write_tiny(tiny_unet, torch.float8_e4m3fn)
    tensors = load_file(file)
    tensors[NAME].view(torch.uint8)[0, 0, 0, 0] = 0xFF
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"contains NaN at index \[0, 0, 0, 0\]"):
        verify_weights(open_checkpoint(tiny_unet), SilentProgress())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_largest_and_smallest_numbers_pass(tiny_unet: Path, dtype: torch.dtype) -> None:
    file = write_tiny(tiny_unet, dtype)
    tensors = load_file(file)
    limits = torch.finfo(dtype)
    tensors[NAME].view(-1)[:4] = torch.tensor(
        [limits.max, limits.min, limits.smallest_normal / 2, -0.0], dtype=dtype
    )
    save_file(tensors, file)
    verify_weights(open_checkpoint(tiny_unet), SilentProgress())


def test_nan_in_the_last_element_across_chunks(tiny_unet: Path) -> None:
    """The tensor is larger than a chunk, 16 MiB."""
    file = write_tiny(tiny_unet, torch.float32)
    tensors = load_file(file)
    tensors[NAME] = torch.zeros(700, 700, 3, 3)
    tensors[NAME][-1, -1, -1, -1] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"contains NaN at index \[699, 699, 2, 2\]"):
        verify_weights(open_checkpoint(tiny_unet), SilentProgress())


def test_nan_outside_the_unet_is_ignored(
    tmp_path: Path, tiny_config: dict[str, Any], tiny_unet: Path
) -> None:
    weights = load_file(write_tiny(tiny_unet, torch.float16))
    file = tmp_path / "whole.safetensors"
    save_file(
        {f"unet.{name}": value for name, value in weights.items()} | {"vae.x": torch.tensor([float("nan")])},
        file,
    )
    checkpoint = open_checkpoint(file, tiny_unet / "config.json")
    assert checkpoint.ignored == {"VAE": 1}
    assert verify_weights(checkpoint, SilentProgress()) == hashlib.sha256(file.read_bytes()).hexdigest()

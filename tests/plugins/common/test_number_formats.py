"""Conversions and offsets that every kernel rests on, over their whole range."""

import struct
from pathlib import Path

import pytest
import torch

from tests.plugins.banded_transport.reference import diamond
from tests.plugins.cases import Harness, read_tensor


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    """Floats that decide rounding: neighbours and midpoints of 16-bit numbers, and the specials."""
    halves = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    midpoints = (halves[:-1].double() + halves[1:].double()).div(2).float()
    brains = torch.arange(0, 0x7F80, 5, dtype=torch.int32).bitwise_left_shift(16).view(torch.float32)
    ties = (brains.view(torch.int32) + 0x8000).view(torch.float32)
    special = torch.tensor([65504.0, 65519.9, 65520.0, 1e30, 3e38, torch.inf, torch.nan, 1e-40])
    values = torch.cat([halves, midpoints, brains, ties, special])
    up, down = (torch.nextafter(values, torch.tensor(limit)) for limit in (torch.inf, -torch.inf))
    values = torch.cat([values, up, down])
    return torch.cat([values, -values])


@pytest.fixture(scope="module")
def results(harness: Harness, inputs: torch.Tensor) -> Path:
    return harness.run({"operator": "arithmetic"}, {"x": inputs})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_that_of_torch(results: Path, inputs: torch.Tensor, dtype: torch.dtype) -> None:
    found = read_tensor(results / f"{str(dtype).removeprefix('torch.')}.bin", dtype)
    expected = inputs.to(dtype)
    same = (found.view(torch.int16) == expected.view(torch.int16)) | (found.isnan() & expected.isnan())
    assert same.all(), inputs[~same][:10]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_widens_exactly(results: Path, dtype: torch.dtype) -> None:
    found = read_tensor(results / f"from_{str(dtype).removeprefix('torch.')}.bin", torch.float32)
    bits = struct.pack("<65536H", *range(65536))
    expected = torch.frombuffer(bytearray(bits), dtype=dtype).float()
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


def test_offsets_enumerate_the_diamond_by_dy_then_dx(results: Path) -> None:
    rows = read_tensor(results / "offsets.bin", torch.int32).view(-1, 4)
    for radius in range(1, 9):
        mine = rows[rows[:, 0] == radius]
        assert [tuple(row) for row in mine[:, 1:3].tolist()] == diamond(radius)
        assert mine[:, 3].tolist() == list(range(len(diamond(radius))))

"""The transport's kernel bodies, every block of the grid, on the CPU."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.plugins.banded_transport.reference import dense_transport, diamond, transport
from tests.plugins.cases import FORMATS, Harness, read_tensor


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The ratio of two rounding errors depends on the values."""
    torch.manual_seed(0)


def make_weights(batch: int, radius: int, grid: tuple[int, int], seed: int) -> torch.Tensor:
    """Rows that sum to about one; entries that leave the grid hold garbage which must not be used."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(batch, len(diamond(radius)), *grid, generator=generator)
    weights = weights / weights.sum(1, keepdim=True)
    height, width = grid
    y, x = torch.arange(height).view(-1, 1), torch.arange(width).view(1, -1)
    for index, (dy, dx) in enumerate(diamond(radius)):
        inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        weights[:, index] = torch.where(inside, weights[:, index], torch.nan)
    return weights


def run_transport(
    harness: Harness,
    weights: torch.Tensor,
    inputs: list[torch.Tensor],
    radius: int,
    *,
    path: str,
    parts: int = 1,
    reversed_threads: bool = False,
) -> list[torch.Tensor]:
    batch, _, height, width = weights.shape
    dtype = inputs[0].dtype
    folder = harness.run(
        {
            "operator": "banded_transport",
            "format": str(dtype).removeprefix("torch."),
            "batch": batch,
            "height": height,
            "width": width,
            "channels": inputs[0].shape[2],
            "radius": radius,
            "tensors": len(inputs),
            "path": path,
            "parts": parts,
            "reversed": int(reversed_threads),
        },
        {"weights": weights} | {f"x{n}": x for n, x in enumerate(inputs)},
    )
    return [read_tensor(folder / f"y{n}.bin", dtype).view_as(x) for n, x in enumerate(inputs)]


def plain_torch_error(weights: torch.Tensor, values: torch.Tensor, radius: int) -> float:
    """Largest error of the dense product in the values' own number format."""
    dense = dense_transport(weights, radius).to(values.dtype)
    return float((dense @ values - transport(weights, values, radius)).abs().max())


@settings(max_examples=12, derandomize=True, deadline=None)
@given(
    path=st.sampled_from(["tensor_core", "scalar"]),
    radius=st.sampled_from([1, 2, 4, 7, 8]),
    grid=st.tuples(st.integers(1, 24), st.integers(1, 24)),
)
# One token, exact tiles, ragged both ways.
@example(path="tensor_core", radius=8, grid=(1, 1))
@example(path="tensor_core", radius=8, grid=(8, 8))
@example(path="scalar", radius=7, grid=(9, 17))
def test_agrees_with_the_literal_transport(
    harness: Harness, path: str, radius: int, grid: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    weights = make_weights(2, radius, grid, seed=radius)
    values = torch.randn(2, grid[0] * grid[1], 40).to(torch.float16)

    (found,) = run_transport(harness, weights, [values], radius, path=path)

    error = (found - transport(weights.nan_to_num(), values, radius)).abs().max()
    # Rounding the result alone costs half a unit in the last place: 2^-12 of values below 4 or so.
    assert error <= 2 * max(plain_torch_error(weights.nan_to_num(), values, radius), 2**-12)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("tensor_core", "float16"),
        ("tensor_core", "bfloat16"),
        ("scalar", "float16"),
        ("scalar", "bfloat16"),
        ("scalar", "float32"),
    ],
)
def test_error_is_at_most_twice_that_of_plain_torch(harness: Harness, path: str, name: str) -> None:
    weights = make_weights(2, 8, (20, 12), seed=3)
    values = torch.randn(2, 240, 72).to(FORMATS[name])

    (found,) = run_transport(harness, weights, [values], 8, path=path)

    error = float((found - transport(weights.nan_to_num(), values, 8)).abs().max())
    assert error <= 2 * plain_torch_error(weights.nan_to_num(), values, 8)


@pytest.mark.parametrize(("path", "channels"), [("tensor_core", 8), ("tensor_core", 104), ("scalar", 33)])
@pytest.mark.parametrize("parts", [1, 3, 5])
def test_keys_and_values_in_one_launch_equal_two_launches(
    harness: Harness, path: str, channels: int, parts: int
) -> None:
    weights = make_weights(1, 8, (11, 13), seed=4)
    keys, values = torch.randn(2, 1, 143, channels).to(torch.bfloat16)

    together = run_transport(harness, weights, [keys, values], 8, path=path, parts=parts)
    alone = [run_transport(harness, weights, [x], 8, path=path)[0] for x in (keys, values)]

    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])


@pytest.mark.parametrize("path", ["tensor_core", "scalar"])
def test_thread_order_does_not_matter(harness: Harness, path: str) -> None:
    weights = make_weights(1, 8, (10, 9), seed=5)
    values = torch.randn(1, 90, 64).to(torch.float16)

    forward = run_transport(harness, weights, [values], 8, path=path)
    backward = run_transport(harness, weights, [values], 8, path=path, reversed_threads=True)

    assert torch.equal(forward[0], backward[0])


@pytest.mark.parametrize("path", ["tensor_core", "scalar"])
def test_identity_returns_its_input_bit_for_bit(harness: Harness, path: str) -> None:
    weights = torch.zeros(1, 145, 9, 14)
    weights[:, diamond(8).index((0, 0))] = 1
    values = torch.randn(1, 126, 48).to(torch.bfloat16)

    (found,) = run_transport(harness, weights, [values], 8, path=path)

    assert torch.equal(found, values)


@pytest.mark.parametrize("path", ["tensor_core", "scalar"])
@pytest.mark.parametrize("offset", [(-8, 0), (-3, 5), (0, -8), (2, -1), (8, 0)])
def test_one_offset_carries_from_the_right_neighbour(
    harness: Harness, path: str, offset: tuple[int, int]
) -> None:
    height, width = 12, 19
    weights = torch.zeros(1, 145, height, width)
    weights[:, diamond(8).index(offset)] = 1
    values = torch.randn(1, height * width, 8).to(torch.float16)

    (found,) = run_transport(harness, weights, [values], 8, path=path)

    image = values.view(height, width, 8)
    expected = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y + offset[0] < height and 0 <= x + offset[1] < width:
                expected[y, x] = image[y + offset[0], x + offset[1]]
    assert torch.equal(found.view_as(image), expected)


@pytest.mark.parametrize(
    ("path", "name", "channels"),
    [("tensor_core", "float16", 40), ("scalar", "bfloat16", 7), ("scalar", "float32", 17)],
)
def test_sanitizers_find_nothing(sanitized_harness: Harness, path: str, name: str, channels: int) -> None:
    weights = make_weights(2, 8, (9, 11), seed=6)
    values = torch.randn(2, 99, channels).to(FORMATS[name])

    found = run_transport(sanitized_harness, weights, [values, values], 8, path=path, parts=2)

    assert all(torch.isfinite(y).all() for y in found)

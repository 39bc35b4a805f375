"""The schedule, and transports against exact arithmetic and their characteristic properties."""

import math
from fractions import Fraction

import pytest
import torch

from graph_passes.parameters import SwsParameters, diamond_offsets
from sws_export.reference import (
    band_from_dense,
    blend_weights,
    blended_transport,
    dense_from_band,
    momentum,
    rebalance,
    scale_transport,
    schedule,
)

DEFAULT = SwsParameters()
GRIDS = [(1, 1), (1, 7), (5, 3), (12, 16), (20, 9)]
Rows = list[list[Fraction]]


def exact_rebalance(rows: Rows, iters: int) -> Rows:
    for _ in range(iters):
        rows = [[entry / sum(row) for entry in row] for row in rows]
        columns = [sum(column) for column in zip(*rows, strict=True)]
        rows = [[entry / total for entry, total in zip(row, columns, strict=True)] for row in rows]
    return rows


def exact_blend(weighted: list[tuple[Fraction, Rows]]) -> Rows:
    size = range(len(weighted[0][1]))
    return [[sum(weight * rows[i][j] for weight, rows in weighted) for j in size] for i in size]


def as_tensor(rows: Rows) -> torch.Tensor:
    return torch.tensor([[float(entry) for entry in row] for row in rows], dtype=torch.float64)


def spread(transport: torch.Tensor) -> float:
    return float((transport.sum(dim=-1) - 1).abs().max())


def random_u(batch: int) -> torch.Tensor:
    return torch.rand(batch, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_schedule_half_way() -> None:
    sigma = torch.tensor([math.sqrt(0.28 * 25)], dtype=torch.float64)
    found = schedule(sigma, torch.tensor([0.5]), DEFAULT)
    expected = {"u": 0.5, "w": 1.0, "kappa": 0.05, "g": 0.75, "tau_q": 1.25}
    for name, value in expected.items():
        assert getattr(found, name).item() == pytest.approx(value, abs=1e-12), name
    assert found.blend.tolist()[0] == pytest.approx([0.25, 0.25, 0.5], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_schedule_is_clamped_outside_of_its_range(dtype: torch.dtype) -> None:
    found = schedule(torch.tensor([1e4, 25, 0.28, 1e-4], dtype=dtype), torch.ones(4), DEFAULT)
    assert found.u.dtype == torch.promote_types(dtype, torch.float32)
    assert found.u.tolist() == pytest.approx([0, 0, 1, 1], abs=1e-3)
    assert found.u[[0, 3]].tolist() == [0, 1]
    assert found.w[[0, 3]].tolist() == [0, 0]
    assert found.kappa[[0, 3]].tolist() == pytest.approx([0.09, 0.01])
    assert found.g[[0, 3]].tolist() == [1, 0.5]
    assert found.tau_q[[0, 3]].tolist() == [2, 1]
    assert found.blend[[0, 3]].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_temperature_is_one_at_intensity_zero() -> None:
    found = schedule(torch.tensor([0.1, 3.0, 30.0]), torch.zeros(3), SwsParameters(theta=7.3))
    assert found.tau_q.tolist() == [1, 1, 1]


def test_noise_schedule_mirrors_progress() -> None:
    sigma = torch.tensor([0.3, 1.0, 7.0, 24.0], dtype=torch.float64)
    intensity = torch.tensor([0.2, 0.5, 0.7, 1.0])
    noise = schedule(sigma, intensity, SwsParameters(schedule="noise"))
    mirrored = schedule(0.28 * 25 / sigma, intensity, DEFAULT)
    for name, expected in vars(mirrored).items():
        torch.testing.assert_close(getattr(noise, name), expected)
    assert noise.u[3] > 0.9
    assert noise.u[0] < 0.1


def test_blend_weights_sum_to_one() -> None:
    weights = blend_weights(torch.linspace(0, 1, 11, dtype=torch.float64))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(11, dtype=torch.float64))
    assert (weights >= 0).all()


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        # One row of three tokens, kernel 2 ** -distance, worked out by hand: rows, then columns, once.
        (1, [["8/11", "2/7", "0"], ["3/11", "3/7", "3/11"], ["0", "2/7", "8/11"]]),
        (2, [["16/27", "4/15", "4/27"], ["7/27", "7/15", "7/27"], ["4/27", "4/15", "16/27"]]),
    ],
)
def test_one_round_on_three_tokens_by_hand(scale: int, expected: list[list[str]]) -> None:
    parameters = SwsParameters(tau=1 / (scale * math.log(2)), sinkhorn_iters=1)
    found = scale_transport(1, 3, scale, parameters, torch.float64)
    exact = as_tensor([[Fraction(text) for text in row] for row in expected])
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)


def test_two_steps_on_two_by_three_tokens_in_exact_arithmetic() -> None:
    # tau = 1 / (4 ln 2) makes the kernel of scale s a power of two: 2 ** (-4 distance / s).
    parameters = SwsParameters(tau=1 / (4 * math.log(2)), scales=(1, 2, 4), sinkhorn_iters=3)
    tokens = [(y, x) for y in range(2) for x in range(3)]

    def exact_scale(scale: int) -> Rows:
        distances = [[abs(y - v) + abs(x - z) for v, z in tokens] for y, x in tokens]
        kernel = [
            [Fraction(1, 2 ** (4 * d // scale)) if d <= scale else Fraction(0) for d in row]
            for row in distances
        ]
        return exact_rebalance(kernel, 3)

    def exact_blended(u: Fraction) -> Rows:
        weights = [(1 - u) / 2, u * (1 - u), u]
        shares = [weight / sum(weights) for weight in weights]
        scales = [exact_scale(scale) for scale in (1, 2, 4)]
        return exact_rebalance(exact_blend(list(zip(shares, scales, strict=True))), 2)

    first = exact_rebalance(exact_blended(Fraction(1, 4)), 2)
    beta = Fraction(4, 5)
    second = exact_rebalance(exact_blend([(beta, first), (1 - beta, exact_blended(Fraction(1, 2)))]), 2)

    def blended(u: float) -> torch.Tensor:
        return blended_transport(torch.tensor([u], dtype=torch.float64), 2, 3, parameters)

    found = momentum(torch.zeros(1, 6, 6, dtype=torch.float64), blended(0.25), parameters)
    torch.testing.assert_close(found[0], as_tensor(first), rtol=1e-12, atol=1e-15)
    found = momentum(found, blended(0.5), parameters)
    torch.testing.assert_close(found[0], as_tensor(second), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_scale_is_local_and_nearly_doubly_stochastic(height: int, width: int, scale: int) -> None:
    transport = scale_transport(height, width, scale, DEFAULT, torch.float64)
    band = band_from_dense(transport[None], height, width)[0]
    for entry, (dy, dx) in enumerate(diamond_offsets(8)):
        on_grid = abs(dy) < height and abs(dx) < width
        assert bool((band[entry] > 0).any()) == (abs(dy) + abs(dx) <= scale and on_grid)
    assert band.sum().item() == pytest.approx(height * width)
    torch.testing.assert_close(transport.sum(dim=0), torch.ones(height * width, dtype=torch.float64))
    assert spread(transport) < 0.05
    more = scale_transport(height, width, scale, SwsParameters(sinkhorn_iters=16), torch.float64)
    assert spread(more) < 0.1 * spread(transport) or spread(transport) < 1e-12


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_blended_and_averaged_transports_are_nearly_doubly_stochastic(height: int, width: int) -> None:
    previous = blended_transport(random_u(3), height, width, DEFAULT)
    averaged = momentum(previous, blended_transport(1 - random_u(3), height, width, DEFAULT), DEFAULT)
    for transport in (previous, averaged):
        ones = torch.ones(3, height * width, dtype=torch.float64)
        torch.testing.assert_close(transport.sum(dim=1), ones)
        assert spread(transport) < 0.01


def test_interior_is_translation_invariant() -> None:
    # Two rounds look 4 * 2 tokens around the 2 that an entry of scale 2 reaches.
    band = band_from_dense(scale_transport(23, 25, 2, DEFAULT, torch.float64)[None], 23, 25)[0]
    interior = band[:, 10:-10, 10:-10]
    torch.testing.assert_close(interior, interior[:, :1, :1].expand_as(interior), rtol=1e-13, atol=0)
    assert (band[:, 0, 0] - band[:, 11, 11]).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [2, 8])
def test_sinkhorn_keeps_the_form_diag_k_diag(scale: int) -> None:
    parameters = SwsParameters(tau=0.7)
    kernel = scale_transport(4, 5, scale, SwsParameters(tau=0.7, sinkhorn_iters=0), torch.float64)
    transport = scale_transport(4, 5, scale, parameters, torch.float64)
    # log(P / K) = log r_i + log c_j on the support: two unknowns a token fit all entries.
    source, target = (kernel > 0).nonzero(as_tuple=True)
    ratio = (transport[source, target] / kernel[source, target]).log()
    one_hot = torch.eye(20, dtype=torch.float64)
    equations = torch.cat([one_hot[source], one_hot[target]], dim=1)
    solution = torch.linalg.lstsq(equations, ratio[:, None], driver="gelsd").solution
    assert len(ratio) > equations.shape[1]
    assert ratio.abs().max() > 0.1
    torch.testing.assert_close((equations @ solution)[:, 0], ratio, rtol=0, atol=1e-12)


def test_a_zero_state_equals_none() -> None:
    fresh = blended_transport(random_u(2), 6, 7, DEFAULT)
    found = momentum(torch.zeros_like(fresh), fresh, DEFAULT)
    torch.testing.assert_close(found, rebalance(fresh, DEFAULT.rebalance_iters), rtol=1e-13, atol=0)
    assert (found - momentum(fresh.flip(0), fresh, DEFAULT)).abs().max() > 1e-3


def test_samples_are_independent() -> None:
    fresh = blended_transport(random_u(2), 6, 7, DEFAULT)
    previous = torch.stack([torch.zeros_like(fresh[0]), fresh[0]])
    together = momentum(previous, fresh, DEFAULT)
    for i in range(2):
        torch.testing.assert_close(
            together[i : i + 1], momentum(previous[i : i + 1], fresh[i : i + 1], DEFAULT)
        )


def test_rebalance_keeps_zeros() -> None:
    assert (rebalance(torch.zeros(2, 3, 3), 2) == 0).all()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1e-10, 1e-10], [1, 1]], [[0.01 / 0.51, 0.01 / 0.51], [0.5 / 0.51, 0.5 / 0.51]]),
        ([[1e-10, 1], [1e-10, 1]], [[0.01, 0.5], [0.01, 0.5]]),
    ],
)
def test_sums_are_clamped(rows: list[list[float]], expected: list[list[float]]) -> None:
    found = rebalance(torch.tensor(rows, dtype=torch.float64), 1)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_the_band_is_lossless(height: int, width: int) -> None:
    transport = blended_transport(random_u(2), height, width, DEFAULT)
    band = band_from_dense(transport, height, width)
    assert band.shape == (2, 145, height, width)
    torch.testing.assert_close(dense_from_band(band), transport, rtol=0, atol=0)
    torch.testing.assert_close(band.sum(dim=1).flatten(1), transport.sum(dim=2))


def test_a_band_entry_maps_a_token_by_its_offset() -> None:
    height, width = 4, 11
    transport = torch.arange(44.0 * 44).view(1, 44, 44) + 1
    band = band_from_dense(transport, height, width)
    offsets = diamond_offsets(8)
    assert band[0, offsets.index((-2, 5)), 3, 1] == transport[0, 3 * width + 1, 1 * width + 6]
    assert band[0, offsets.index((0, 0)), 2, 7] == transport[0, 2 * width + 7, 2 * width + 7]
    assert band[0, offsets.index((0, -2)), 2, 1] == 0
    assert band[0, offsets.index((1, 0)), 3, 1] == 0


def test_band_entries_outside_the_grid_are_ignored() -> None:
    band = band_from_dense(blended_transport(random_u(1), 3, 4, DEFAULT), 3, 4)
    cell = (0, diamond_offsets(8).index((0, -1)), 1, 0)
    assert band[cell] == 0
    polluted = band.clone()
    polluted[cell] = 9.0
    assert torch.equal(dense_from_band(polluted), dense_from_band(band))

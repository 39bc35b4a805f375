"""The formulas of the ComfyUI node against a NumPy transcription of their description."""

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_passes.parameters import SwsParameters
from sws_export.reference import (
    ComfyUINodeResult,
    comfyui_node_patch,
    comfyui_node_schedule,
    fresh_transport,
    moving_average,
    text_grid,
    transport_radius,
)
from sws_export.reference.comfyui_node_guard import kl_divergence
from sws_export.reference.orthonormal_basis import orthonormal_basis

Array = npt.NDArray[np.float64]

DEFAULT = SwsParameters()
LOW, HIGH = 0.28, 25.0


def remaining_noise(sigma: float) -> float:
    clamped = min(max(sigma, LOW), HIGH)
    return min(max((math.log(clamped) - math.log(LOW)) / (math.log(HIGH) - math.log(LOW)), 0.0), 1.0)


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def balanced(p: Array) -> Array:
    for _ in range(2):
        p = p / np.maximum(p.sum(axis=1), 1e-8)[:, None]
        p = p / np.maximum(p.sum(axis=0), 1e-8)[None, :]
    return p


def transport_of(tokens: int, u: float) -> Array:
    """One entry at a time."""
    root = round(tokens**0.5)
    rows = -(-tokens // root)
    height, width = (rows, root) if rows * root == tokens else (1, tokens)
    radius = max(1, int(0.5 * max(1, min(height, width, max(1, int(8 * (1 - u)))) // 2)))
    scores = np.empty((tokens, tokens))
    for i in range(tokens):
        for j in range(tokens):
            apart = abs(i // width - j // width) + abs(i % width - j % width)
            scores[i, j] = (-(apart / radius) if apart <= radius else -1e4) / 0.3
    return balanced(softmax(scores))


def basis_of(wide: int, narrow: int) -> Array:
    generator = torch.Generator().manual_seed(wide * 1000003 + narrow * 9176)
    columns = torch.linalg.qr(torch.randn(wide, narrow, generator=generator))[0]
    return columns.double().numpy()


def weights_of(q: Array, k: Array) -> Array:
    wide, narrow = max(q.shape[-1], k.shape[-1]), min(q.shape[-1], k.shape[-1])
    if wide != narrow:
        basis = basis_of(wide, narrow)
        q, k = (x @ basis if x.shape[-1] == wide else x for x in (q, k))
    return softmax(np.einsum("btd,bnd->btn", q, k) / math.sqrt(narrow))


@dataclasses.dataclass
class Expected:
    q: Array
    k: Array
    v: Array
    transport: Array
    alpha: float
    a_v: float
    a: float


def site_of(
    q: Array,
    k: Array,
    v: Array,
    previous: Array | None,
    sigma: float,
    intensity: float,
    floor: float = 0.01,
    slope: float = 0.08,
) -> Expected:
    u = remaining_noise(sigma)
    tau = 1 + (1 - u)
    q, k = q / math.sqrt(tau), k / math.sqrt(tau)
    plain = weights_of(q, k)
    rows = [-sum(p * math.log(p) for p in row if p > 0) for member in plain for row in member]
    h = min(max((sum(rows) / len(rows) - min(rows)) / max(max(rows) - min(rows), 1e-6), 0.0), 1.0)
    a = min(max(intensity * h * 4 * u * (1 - u), 0.0), 1.0)
    if a == 0:
        return Expected(q, k, v, np.zeros(()) if previous is None else previous, 0.0, 0.0, 0.0)
    transport = transport_of(k.shape[1], u)
    if previous is not None:
        transport = balanced(0.8 * previous + 0.2 * transport)
    kp, vp = (np.einsum("ij,bjc->bic", transport, x) for x in (k, v))

    def divergence(alpha: float) -> float:
        new = weights_of(q, (1 - alpha) * k + alpha * kp)
        logs = np.log(np.maximum(new, 1e-8)) - np.log(np.maximum(plain, 1e-8))
        return float((new * logs).sum(axis=-1).mean())

    low, high = 0.0, 0.3 * a
    for _ in range(7):
        middle = (low + high) / 2
        if divergence(middle) <= slope * (1 - u) + floor:
            low = middle
        else:
            high = middle
    alpha = 0.0 if u >= 0.75 else low
    a_v = min(max(0.6 * a * (0.5 + 0.5 * (1 - u)), 0.0), 1.0)
    mixed_k, mixed_v = (1 - alpha) * k + alpha * kp, (1 - a_v) * v + a_v * vp
    return Expected(q, mixed_k, mixed_v, transport, alpha, a_v, a)


def tensors(queries: int, text: int, tokens: int = 7, peaked: float = 3.0) -> list[torch.Tensor]:
    """q [2, 5, queries], k and v [2, tokens, text]; `peaked` scales the logits."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 5, queries, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 2, tokens, text, dtype=torch.float64, generator=generator)
    # Rows differ in how certain they are, and so do the members of the batch.
    stretch = torch.linspace(0.2, peaked, 10, dtype=torch.float64).view(2, 5, 1)
    return [q * stretch, k, v]


def run_site(
    given: list[torch.Tensor],
    previous: Array | None,
    sigma: float,
    intensity: float,
    parameters: SwsParameters = DEFAULT,
) -> ComfyUINodeResult:
    now = comfyui_node_schedule(torch.tensor([sigma], dtype=torch.float64), parameters)
    tokens = given[1].shape[1]
    kept = torch.zeros(tokens, tokens).double() if previous is None else torch.from_numpy(previous)
    strength = torch.tensor([intensity], dtype=torch.float64)
    return comfyui_node_patch(
        *given, kept, fresh_transport(tokens, now.u, parameters), now, strength, parameters
    )


def test_u_decreases_from_sigma_max_to_sigma_min() -> None:
    now = [
        comfyui_node_schedule(torch.tensor([sigma], dtype=torch.float64), DEFAULT)
        for sigma in (99, 25, 3.0, 0.28, 1e-4)
    ]
    assert [float(step.u) for step in now] == [1, 1, pytest.approx(remaining_noise(3.0)), 0, 0]
    assert [float(step.tau) for step in now] == [1, 1, pytest.approx(2 - remaining_noise(3.0)), 2, 2]
    assert [float(step.w) for step in (now[0], now[1], now[3], now[4])] == [0, 0, 0, 0]
    assert float(now[2].kappa) == pytest.approx(0.08 * (1 - remaining_noise(3.0)) + 0.01)
    assert [float(step.g) for step in (now[0], now[-1])] == [0.5, 1]


def test_the_first_sample_sets_the_noise_level_of_the_batch() -> None:
    both = comfyui_node_schedule(torch.tensor([3.0, 0.5]), DEFAULT)
    assert both.u.shape == (1,)
    assert torch.equal(both.u, comfyui_node_schedule(torch.tensor([3.0]), DEFAULT).u)


@pytest.mark.parametrize("sigma", [25.0, 0.28])
def test_the_ends_are_exact_in_float32(sigma: float) -> None:
    assert float(comfyui_node_schedule(torch.tensor([sigma]), DEFAULT).w) == 0


@pytest.mark.parametrize(
    ("tokens", "grid"),
    [
        (1, (1, 1)),
        (2, (2, 1)),
        (7, (1, 7)),
        (64, (8, 8)),
        (72, (9, 8)),
        (77, (1, 77)),
        (154, (1, 154)),
        (231, (1, 231)),
        (256, (16, 16)),
    ],
)
def test_grids_of_text_tokens(tokens: int, grid: tuple[int, int]) -> None:
    assert text_grid(tokens) == grid


def test_only_n_by_n_and_n_plus_1_by_n_grids_have_two_dimensions() -> None:
    flat = {n for n in range(3, 1000) if text_grid(n)[0] == 1}
    assert set(range(3, 1000)) - flat == {
        n for m in range(1, 40) for n in (m * m, m * (m + 1)) if 3 <= n < 1000
    }


def test_the_radius_exceeds_one_only_near_u_0_on_large_grids() -> None:
    radii = {
        (height, u): transport_radius(height, height, u)
        for height in (1, 2, 7, 8, 20)
        for u in (0.0, 1e-6, 0.4, 1.0)
    }
    assert {case for case, radius in radii.items() if radius != 1} == {(8, 0.0), (20, 0.0)}
    assert transport_radius(8, 8, 0.0) == 2
    assert transport_radius(1, 77, 0.0) == 1


@pytest.mark.parametrize("u", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 72, 77])
def test_transport_equals_the_transcription(tokens: int, u: float) -> None:
    found = fresh_transport(tokens, torch.tensor([u], dtype=torch.float64), DEFAULT)
    np.testing.assert_allclose(found.numpy(), transport_of(tokens, u), rtol=1e-12, atol=1e-15)


def test_the_first_step_returns_the_fresh_transport() -> None:
    fresh = fresh_transport(9, torch.tensor([0.5]), DEFAULT)
    assert torch.equal(moving_average(torch.zeros(9, 9), fresh, DEFAULT), fresh)
    assert not torch.allclose(moving_average(fresh, fresh, DEFAULT), fresh, atol=1e-5)


def test_later_steps_are_averaged_and_rebalanced() -> None:
    earlier, fresh = transport_of(64, 0.0), transport_of(64, 0.5)
    found = moving_average(torch.from_numpy(earlier), torch.from_numpy(fresh), DEFAULT)
    np.testing.assert_allclose(found.numpy(), balanced(0.8 * earlier + 0.2 * fresh), rtol=1e-12)


@pytest.mark.parametrize(("wide", "narrow"), [(768, 320), (1280, 768)])
def test_the_basis_is_torchs_for_the_seed_and_orthonormal(wide: int, narrow: int) -> None:
    basis = orthonormal_basis(wide, narrow)
    assert basis.dtype == torch.float32
    assert basis.shape == (wide, narrow)
    np.testing.assert_array_equal(basis.double().numpy(), basis_of(wide, narrow))
    torch.testing.assert_close(basis.T @ basis, torch.eye(narrow), atol=1e-5, rtol=0)


# Caps that never bind, that bind, and that allow nothing.
CAPS = [(0.01, 0.08), (1e-5, 0.0), (1e-6, 0.0), (0.0, 0.0)]


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    queries=st.integers(3, 9),
    text=st.integers(3, 9),
    sigma=st.floats(0.3, 14.0),
    history=st.booleans(),
    caps=st.sampled_from(CAPS) | st.tuples(st.floats(0, 0.01), st.floats(0, 0.08)),
)
def test_a_site_equals_the_transcription(
    queries: int, text: int, sigma: float, history: bool, caps: tuple[float, float]
) -> None:
    inputs, (floor, slope) = tensors(queries, text), caps
    previous = transport_of(7, 0.9) if history else None
    parameters = SwsParameters(kl_floor=floor, kl_slope=slope)
    found = run_site(inputs, previous, sigma, 0.8, parameters)
    expected = site_of(*(x.numpy() for x in inputs), previous, sigma, 0.8, floor, slope)
    assert expected.a > 0
    for name in ("q", "k", "v", "transport"):
        np.testing.assert_allclose(
            getattr(found, name).numpy(), getattr(expected, name), rtol=1e-9, atol=1e-12, err_msg=name
        )
    assert float(found.alpha_k) == pytest.approx(expected.alpha, abs=1e-12)
    assert float(found.a_v) == pytest.approx(expected.a_v, abs=1e-12)
    assert float(found.kl) <= slope * (1 - remaining_noise(sigma)) + floor + 1e-15


def test_weights_are_clamped_in_logarithms() -> None:
    plain = torch.tensor([[[1 - 1e-20, 1e-20]]], dtype=torch.float64)
    even = torch.tensor([[[0.5, 0.5]]], dtype=torch.float64)
    assert float(kl_divergence(even, plain)) == pytest.approx(
        0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-8)
    )
    assert float(kl_divergence(plain, even)) == pytest.approx(math.log(2))


def test_the_caps_bind_and_do_not() -> None:
    """The parametrized cases above cover both sides of each cap."""
    shares = {caps: site_of(*(x.numpy() for x in tensors(6, 6)), None, 1.5, 0.8, *caps) for caps in CAPS}
    free = {caps: found.alpha / (0.3 * found.a * 127 / 128) for caps, found in shares.items()}
    assert free[CAPS[0]] == pytest.approx(1)
    assert 0.05 < free[CAPS[1]] < 0.95
    assert 0 < free[CAPS[2]] < 0.2
    assert free[CAPS[3]] == 0


def test_keys_are_unchanged_above_u_stop() -> None:
    given = tensors(6, 6)
    # u is 0.75 at sigma 8.13.
    early, later = (run_site(given, None, sigma, 1.0) for sigma in (8.2, 8.0))
    assert float(early.alpha_k) == 0
    assert float(early.a_v) > 0
    assert float(later.alpha_k) > 0


@pytest.mark.parametrize(("sigma", "intensity"), [(3.0, 0.0), (25.0, 1.0), (0.28, 1.0)])
def test_zero_amplitude_only_applies_the_temperature(sigma: float, intensity: float) -> None:
    given = tensors(6, 6)
    kept = transport_of(7, 0.9)
    found = run_site(given, kept, sigma, intensity)
    root = math.sqrt(2 - remaining_noise(sigma))
    np.testing.assert_allclose(found.q.numpy(), given[0].numpy() / root, rtol=1e-14)
    np.testing.assert_allclose(found.k.numpy(), given[1].numpy() / root, rtol=1e-14)
    assert torch.equal(found.v, given[2])
    np.testing.assert_array_equal(found.transport.numpy(), kept)
    assert (run_site(given, None, sigma, intensity).transport == 0).all()


def test_one_text_token_is_not_mixed() -> None:
    assert float(run_site(tensors(6, 6, tokens=1), None, 3.0, 1.0).amplitude) == 0


def test_the_uncertainty_is_shared_across_the_batch() -> None:
    given = tensors(6, 6)
    both = run_site(given, None, 3.0, 1.0)
    alone = [run_site([x[member : member + 1] for x in given], None, 3.0, 1.0) for member in (0, 1)]
    assert all(abs(float(both.uncertainty - one.uncertainty)) > 1e-3 for one in alone)
    assert both.alpha_k.shape == both.a_v.shape == (1,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_the_outputs_have_low_precision(dtype: torch.dtype) -> None:
    given = [x.to(dtype) for x in tensors(6, 9)]
    now = comfyui_node_schedule(torch.tensor([3.0]), DEFAULT)
    fresh = fresh_transport(7, now.u, DEFAULT)
    found = comfyui_node_patch(*given, torch.zeros(7, 7), fresh, now, torch.ones(1), DEFAULT)
    wide = [x.double() for x in given]
    expected = run_site(wide, None, 3.0, 1.0)
    assert {x.dtype for x in (found.q, found.k, found.v)} == {dtype}
    assert found.transport.dtype == found.alpha_k.dtype == torch.float32
    torch.testing.assert_close(found.alpha_k.double(), expected.alpha_k, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.k.double(), expected.k, rtol=3e-2, atol=3e-2)

"""One attention site against a literal transcription in numpy and its characteristic properties."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graph_passes.parameters import SwsParameters
from sws_export.reference import (
    SiteResult,
    attention_site,
    blended_transport,
    kl_divergence,
    largest_mixing,
    schedule,
)

DEFAULT = SwsParameters()
HEIGHT, WIDTH = 3, 5
TOKENS = HEIGHT * WIDTH
SIGMA = torch.tensor([9.0, 2.0, 0.6], dtype=torch.float64)
INTENSITY = torch.tensor([0.5, 1.0, 0.8], dtype=torch.float64)


def random_qkv(batch: int = 3, peaked: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys and values, [batch, 2, 15, 4]; `peaked` scales the logits."""
    generator = torch.Generator().manual_seed(11)
    q, k, v = torch.randn(3, batch, 2, TOKENS, 4, dtype=torch.float64, generator=generator)
    return [(peaked * q).to(dtype), k.to(dtype), v.to(dtype)]


def run_site(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sigma: Tensor = SIGMA,
    intensity: Tensor = INTENSITY,
    parameters: SwsParameters = DEFAULT,
) -> SiteResult:
    dtype = torch.promote_types(q.dtype, torch.float32)
    intensity = intensity.to(dtype)
    now = schedule(sigma.to(dtype), intensity, parameters)
    transport = blended_transport(now.u, HEIGHT, WIDTH, parameters)
    return attention_site(q, k, v, transport, now, intensity, parameters)


def random_keys_and_transported(peaked: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    q, k, _ = random_qkv(peaked=peaked)
    transport = blended_transport(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), HEIGHT, WIDTH, DEFAULT)
    return q, k, transport[:, None] @ k


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def site_of_one_sample(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    transport: np.ndarray,
    u: float,
    intensity: float,
    kappa: float,
) -> dict[str, float | np.ndarray]:
    """The formulas for one sample, [h, T, D], with the default constants; evaluates all 128 shares."""
    root = math.sqrt(q.shape[-1])
    q = q / (1 + intensity * (1 - u))
    plain = softmax(q @ k.swapaxes(1, 2) / root)
    entropy = -(plain * np.log(plain)).sum(axis=-1)
    hu = (entropy.mean() - entropy.min()) / (entropy.max() - entropy.min())
    a = intensity * hu * 4 * u * (1 - u)
    kp, vp = transport @ k, transport @ v

    def attention(alpha: float) -> np.ndarray:
        return softmax(q @ ((1 - alpha) * k + alpha * kp).swapaxes(1, 2) / root)

    def kl(alpha: float) -> float:
        new = attention(alpha)
        return float((new * np.log(new / plain)).sum(axis=-1).mean())

    shares = [0.3 * a * n / 128 for n in range(128)]
    alpha_k = max(share for share in shares if kl(share) <= kappa)
    alpha_k = 0.0 if u >= 0.75 else alpha_k
    a_v = 0.6 * a * (0.5 + 0.5 * (1 - u))
    return {
        "out": attention(alpha_k) @ ((1 - a_v) * v + a_v * vp),
        "alpha_k": alpha_k,
        "a_v": a_v,
        "amplitude": a,
        "hu": hu,
        "entropy_mean": entropy.mean(),
        "entropy_min": entropy.min(),
        "entropy_max": entropy.max(),
        "kl": kl(alpha_k),
    }


@pytest.mark.parametrize("peaked", [1.0, 6.0])
@pytest.mark.parametrize("budget", [{}, {"kl_floor": 1e-4, "kl_slope": 1e-4}])
def test_a_site_matches_the_formulas(peaked: float, budget: dict[str, float]) -> None:
    parameters = SwsParameters(**budget)
    q, k, v = random_qkv(peaked=peaked)
    found = run_site(q, k, v, parameters=parameters)
    now = schedule(SIGMA, INTENSITY, parameters)
    transport = blended_transport(now.u, HEIGHT, WIDTH, parameters)
    for i in range(3):
        arrays = (tensor[i].numpy() for tensor in (q, k, v, transport))
        expected = site_of_one_sample(*arrays, now.u[i].item(), INTENSITY[i].item(), now.kappa[i].item())
        for name, value in expected.items():
            actual = getattr(found, name)[i].numpy()
            np.testing.assert_allclose(actual, value, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("peaked", [1.0, 8.0])
def test_kl_grows_with_alpha_as_the_variance_of_delta(peaked: float) -> None:
    q, k, kp = random_keys_and_transported(peaked)
    s0 = q @ k.mT / 2
    delta = q @ kp.mT / 2 - s0
    last = kl_divergence(q, k, kp, torch.zeros(3, dtype=torch.float64))
    assert (last == 0).all()
    for step in range(1, 6):
        alpha = torch.full((3,), 0.2 * step, dtype=torch.float64, requires_grad=True)
        kl = kl_divergence(q, k, kp, alpha)
        (slope,) = torch.autograd.grad(kl.sum(), alpha)
        weights = (s0 + 0.2 * step * delta).softmax(dim=-1)
        mean = (weights * delta).sum(dim=-1, keepdim=True)
        variance = (weights * (delta - mean) ** 2).sum(dim=-1).mean(dim=(1, 2))
        torch.testing.assert_close(slope, 0.2 * step * variance)
        assert (kl > last).all()
        last = kl.detach()


@pytest.mark.parametrize("peaked", [1.0, 8.0])
def test_kl_equals_its_streaming_form(peaked: float) -> None:
    q, k, kp = random_keys_and_transported(peaked)
    alpha = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    s0 = q @ k.mT / 2
    delta = q @ kp.mT / 2 - s0
    share = alpha[:, None, None, None]
    expected_delta = ((s0 + share * delta).softmax(dim=-1) * delta).sum(dim=-1)
    log_mean_exp = (s0.log_softmax(dim=-1) + share * delta).logsumexp(dim=-1)
    streaming = (share[..., 0] * expected_delta - log_mean_exp).mean(dim=(1, 2))
    torch.testing.assert_close(kl_divergence(q, k, kp, alpha), streaming)


def test_an_unreached_budget_gives_the_limit_but_for_one_interval() -> None:
    q, k, kp = random_keys_and_transported()
    limit = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    kappa = kl_divergence(q, k, kp, limit)
    found = largest_mixing(q, k, kp, limit, kappa, DEFAULT)
    torch.testing.assert_close(found, limit * 127 / 128, rtol=1e-15, atol=0)
    found = largest_mixing(q, k, kp, limit, kappa, SwsParameters(bisection_steps=3))
    torch.testing.assert_close(found, limit * 7 / 8, rtol=1e-15, atol=0)


@pytest.mark.parametrize("peaked", [1.0, 8.0])
def test_a_binding_budget_gives_the_largest_share_within_it(peaked: float) -> None:
    q, k, kp = random_keys_and_transported(peaked)
    limit = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    kappa = kl_divergence(q, k, kp, limit * torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64))
    found = largest_mixing(q, k, kp, limit, kappa, DEFAULT)
    steps = found * 128 / limit
    assert steps.tolist() == pytest.approx([math.floor(128 * share) for share in (0.2, 0.5, 0.9)])
    assert (kl_divergence(q, k, kp, found) <= kappa).all()
    assert (kl_divergence(q, k, kp, found + limit / 128) > kappa).all()


def test_no_budget_means_no_key_mixing() -> None:
    q, k, v = random_qkv()
    found = run_site(q, k, v, parameters=SwsParameters(kl_floor=0, kl_slope=0))
    assert found.alpha_k.tolist() == [0, 0, 0]
    assert found.kl.tolist() == [0, 0, 0]
    assert (found.a_v > 0).all()


def test_a_tight_cap_binds_within_a_site() -> None:
    q, k, v = random_qkv(peaked=6)
    parameters = SwsParameters(kl_floor=1e-4, kl_slope=0)
    found = run_site(q, k, v, sigma=torch.tensor([9.0, 2.0, 1.6], dtype=torch.float64), parameters=parameters)
    assert (found.alpha_k > 0).all()
    assert (found.alpha_k < 0.9 * 0.3 * found.amplitude).all()
    assert (found.kl <= 1e-4).all()
    assert (found.kl > 0.9e-4).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_intensity_zero_is_plain_attention(dtype: torch.dtype) -> None:
    q, k, v = random_qkv(dtype=dtype)
    found = run_site(q, k, v, intensity=torch.zeros(3))
    assert torch.equal(found.out, F.scaled_dot_product_attention(q, k, v))
    assert found.alpha_k.tolist() == [0, 0, 0]
    assert found.a_v.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("sigma", "progress"), [(1e4, 0.0), (1e-4, 1.0)])
def test_no_mixing_at_the_ends_of_the_schedule(sigma: float, progress: float) -> None:
    q, k, v = random_qkv()
    found = run_site(q, k, v, sigma=torch.full((3,), sigma))
    assert found.amplitude.tolist() == [0, 0, 0]
    temperature = (1 + INTENSITY * (1 - progress))[:, None, None, None]
    torch.testing.assert_close(found.out, F.scaled_dot_product_attention(q / temperature, k, v))


def test_only_values_are_mixed_above_u_stop() -> None:
    # u is 0.75 at sigma 0.28 ** 0.75 * 25 ** 0.25 = 0.8609...
    q, k, v = random_qkv()
    found = run_site(q, k, v, sigma=torch.tensor([0.87, 0.85, 0.4], dtype=torch.float64))
    assert (found.alpha_k > 0).tolist() == [True, False, False]
    assert (found.a_v > 0).all()


def test_identity_transport_changes_nothing_but_the_temperature() -> None:
    q, k, v = random_qkv()
    now = schedule(SIGMA, INTENSITY, SwsParameters(theta=0))
    identity = torch.eye(TOKENS, dtype=torch.float64).expand(3, -1, -1)
    found = attention_site(q, k, v, identity, now, INTENSITY, DEFAULT)
    assert (found.amplitude > 0).all()
    torch.testing.assert_close(found.out, F.scaled_dot_product_attention(q, k, v))


def test_uniform_attention_has_no_amplitude() -> None:
    q, k, v = random_qkv()
    found = run_site(torch.zeros_like(q), k, v)
    assert found.hu.tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert found.entropy_mean.tolist() == pytest.approx([math.log(TOKENS)] * 3)


def test_nearly_uniform_attention_still_has_an_amplitude() -> None:
    q, k, v = random_qkv(peaked=1e-2)
    found = run_site(q, k, v)
    assert (found.entropy_max - found.entropy_min < 1e-3).all()
    assert (found.hu > 0.3).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_extremely_peaked_attention_stays_finite(dtype: torch.dtype) -> None:
    q, k, v = random_qkv(peaked=300, dtype=dtype)
    found = run_site(q, k, v)
    for name, value in vars(found).items():
        assert value.isfinite().all(), name
    assert (found.entropy_min < 1e-6).all()


def test_samples_are_independent() -> None:
    q, k, v = random_qkv(peaked=3)
    together = run_site(q, k, v)
    for i in range(3):
        one = slice(i, i + 1)
        alone = run_site(q[one], k[one], v[one], SIGMA[one], INTENSITY[one])
        for name, value in vars(alone).items():
            torch.testing.assert_close(getattr(together, name)[one], value)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_low_precision_keeps_statistics_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = random_qkv(dtype=dtype)
    found = run_site(q, k, v)
    exact = run_site(q.double(), k.double(), v.double())
    for field in dataclasses.fields(SiteResult):
        value = getattr(found, field.name)
        assert value.dtype == (dtype if field.name == "out" else torch.float32)
        torch.testing.assert_close(
            value.double(), getattr(exact, field.name), rtol=2 * tolerance, atol=tolerance, msg=field.name
        )

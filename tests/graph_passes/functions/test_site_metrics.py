"""Entropy and KL divergence of a site against float64 with materialized logits."""

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from graph_passes.functions import build_functions
from graph_passes.guard import GuardOptions
from graph_passes.parameters import SwsParameters
from graph_passes.target import TARGETS
from tests.graph_passes.functions.calls import FLOAT, Array, Call

HEADS, SIZE = 2, 16
WIDTH = HEADS * SIZE
ALPHA = np.array([0.3, 0.07], np.float32)
TAU = np.array([1.0, 1.5], np.float32)
Floats = npt.NDArray[np.float64]
Tokens = tuple[Array, Array, Array]


def noise(count: int, peak: float = 1.0, seed: int = 0) -> Tokens:
    """Queries, keys, and keys moved by a token; the larger the queries, the more peaked the rows."""
    rng = np.random.default_rng(seed)
    q, k, e = (rng.standard_normal((2, count, WIDTH), dtype=np.float32) for _ in range(3))
    k_perm = 0.5 * k + 0.3 * np.roll(k, 1, axis=1) + 0.1 * e
    return np.float32(peak) * q, k, k_perm.astype(np.float32)


def offset(count: int) -> Tokens:
    """All keys share a large vector, which no weight depends on."""
    q, k, k_perm = noise(count, peak=2)
    return q + 4, k + 8, k_perm + 8


def one_hot(count: int) -> Tokens:
    """Each row attends to its own token, which mixing moves away."""
    _, k, _ = noise(count)
    return 12 * k, k, np.float32(0.7) * np.roll(k, 1, axis=1)


CASES: dict[str, Callable[[int], Tokens]] = {
    "flat": lambda count: noise(count, 0.3),
    "usual": noise,
    "peaked": lambda count: noise(count, 4.0),
    "large logits": lambda count: noise(count, 16.0),
    "one-hot rows": one_hot,
    "an offset": offset,
}


@cache
def metrics(dtype: ir.DataType = FLOAT) -> Call:
    tokens = ["batch", "tokens", WIDTH]
    return Call(
        build_functions(
            SwsParameters(), dtype, TARGETS["tensorrt"], GuardOptions("fused"), site_metrics=True
        ),
        "SiteMetrics",
        {"q": tokens, "k": tokens, "k_perm": tokens},
        FLOAT,
        {"num_heads": HEADS, "scale": SIZE**-0.5},
    )


def heads(x: Array) -> Floats:
    return x.astype(np.float64).reshape(*x.shape[:2], HEADS, SIZE).transpose(0, 2, 1, 3)


def log_softmax(logits: Floats) -> Floats:
    lowered = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(lowered - np.log(np.exp(lowered).sum(axis=-1, keepdims=True)), np.float64)


def by_definition(q: Array, k: Array, k_perm: Array, alpha: Array = ALPHA) -> Floats:
    query = heads(q) / TAU[:, None, None, None] / SIZE**0.5
    key, moved = heads(k), heads(k_perm)
    plain = log_softmax(query @ key.swapaxes(2, 3))
    mixed = log_softmax(query @ (key + alpha[:, None, None, None] * (moved - key)).swapaxes(2, 3))
    entropy = -(np.exp(plain) * plain).sum(axis=-1).reshape(len(q), -1)
    kl = (np.exp(mixed) * (mixed - plain)).sum(axis=-1).reshape(len(q), -1)
    return np.stack([entropy.mean(1), entropy.min(1), entropy.max(1), kl.mean(1)], axis=1)


def found(tokens: Tokens, alpha: Array = ALPHA, dtype: ir.DataType = FLOAT) -> Array:
    q, k, k_perm = (x.astype(dtype.numpy()) for x in tokens)
    (values,) = metrics(dtype)(q=q, k=k, k_perm=k_perm, tau_q=TAU, alpha_k=alpha)
    assert values.shape == (len(q), 4)
    assert values.dtype == np.float32
    return values


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("count", [12, 96, 300])
def test_metrics_equal_the_definition(case: Callable[[int], Tokens], count: int) -> None:
    tokens = case(count)
    np.testing.assert_allclose(found(tokens), by_definition(*tokens), rtol=2e-4, atol=2e-4)


def test_no_mixing_gives_no_divergence() -> None:
    tokens = noise(96, 16.0)
    assert np.abs(found(tokens, np.zeros(2, np.float32))[:, 3]).max() < 1e-4


def test_samples_are_independent() -> None:
    one, other = noise(96, seed=1), noise(96, seed=2)
    mixed: Tokens = tuple(np.stack([a[0], b[1]]) for a, b in zip(one, other, strict=True))  # type: ignore[assignment]
    np.testing.assert_allclose(found(mixed)[1], found(other)[1], rtol=1e-6)
    assert np.abs(found(mixed)[0] - found(other)[0]).max() > 1e-3


def test_metrics_of_float16_tokens_are_float32() -> None:
    q, k, k_perm = (x.astype(np.float16) for x in noise(96, 4.0))
    expected = by_definition(q, k, k_perm)
    np.testing.assert_allclose(found((q, k, k_perm), dtype=ir.DataType.FLOAT16), expected, atol=2e-4)

"""Queries and keys of a site with rows of five kinds, as float16 kernels meet them."""

from typing import Literal

import numpy as np

from tests.graph_passes.functions.calls import Array

Kind = Literal["flat", "mid", "peaked", "mixed", "shifted"]
KINDS: tuple[Kind, ...] = ("flat", "mid", "peaked", "mixed", "shifted")
_SHARPNESS: dict[Kind, float] = {"flat": 0.35, "mid": 1.3, "peaked": 3.0, "mixed": 1.3, "shifted": 1.3}


def site_rows(
    kind: Kind, height: int, width: int, heads: int, size: int, seed: int, rows: int | None = None
) -> tuple[Array, Array, Array]:
    """q [T', C], k and k_perm [T, C] in float32: a smooth image with noise, and a vector common to all keys.

    Args:
        kind: `mixed` has row temperatures over two decades, heads that differ, and rows with one key;
            `shifted` a large vector common to all keys.
        height: Of the grid; T is height times width.
        width: Of the grid.
        heads: Number of heads.
        size: Head size.
        seed: Of all random numbers.
        rows: T', random rows of the grid; None for all.
    """
    rng = np.random.default_rng(seed)
    tokens, channels = height * width, heads * size
    base = _smooth(rng.standard_normal((height, width, channels)), 3)
    base = (base / base.std()).reshape(tokens, channels)
    common = rng.standard_normal(channels)
    k = 0.8 * base + 0.5 * rng.standard_normal(base.shape) + 0.7 * common
    if kind == "shifted":
        k += 2.5 * rng.standard_normal(channels)
    q = (0.8 * base + 0.5 * rng.standard_normal(base.shape)) * _SHARPNESS[kind]
    if kind == "mixed":
        spread = np.exp(0.8 * rng.standard_normal((tokens, heads, 1))) * np.linspace(0.5, 1.6, heads)[:, None]
        q = (q.reshape(tokens, heads, size) * spread).reshape(tokens, channels)
    k_perm = _smooth(k.reshape(height, width, channels), 2).reshape(tokens, channels)
    if rows is not None:
        q = q[np.sort(rng.permutation(tokens)[:rows])]
    return q.astype(np.float32), k.astype(np.float32), k_perm.astype(np.float32)


def _smooth(x: np.ndarray, radius: int) -> np.ndarray:
    """Means over squares of the grid [H, W, C], cut at its border."""
    for axis in (0, 1):
        count = x.shape[axis]
        distance = np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
        weights = (distance <= radius).astype(np.float64)
        weights /= weights.sum(1, keepdims=True)
        x = np.moveaxis(np.tensordot(weights, x, (1, axis)), 0, axis)
    return x

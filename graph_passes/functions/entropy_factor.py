"""The entropy factor hu: the mean row entropy, relative to the range of all row entropies."""

from collections.abc import Sequence
from typing import Any

from graph_passes.functions.building import Op

_MIN_RANGE = 1e-6
"""Smallest range of entropies (nats) that the factor is relative to."""


def entropy_factor(op: Op, entropy: Any, axes: Sequence[int] = (1, 2, 3)) -> Any:
    """(mean - min) / max(max - min, 1e-6) of row entropies over `axes`, clamped to [0, 1].

    By default `entropy` is [B, h, T, 1] and the result [B], both float32.
    """
    axes = list(axes)
    smallest = op.ReduceMin(entropy, axes, keepdims=0)
    mean = op.ReduceMean(entropy, axes, keepdims=0)
    width = op.Max(op.Sub(op.ReduceMax(entropy, axes, keepdims=0), smallest), _MIN_RANGE)
    return op.Clip(op.Div(op.Sub(mean, smallest), width), 0.0, 1.0)

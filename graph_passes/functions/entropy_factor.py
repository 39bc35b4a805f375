"""The entropy factor hu: the mean row entropy, relative to the range of all row entropies."""

from typing import Any

from graph_passes.functions.building import Op

MIN_RANGE = 1e-6
"""Smallest range of entropies (nats) that the factor is relative to."""


def entropy_factor(op: Op, entropy: Any) -> Any:
    """(mean - min) / max(max - min, 1e-6) of the row entropies of a sample, clamped to [0, 1]; [B] float32.

    `entropy` is [B, h, T, 1] float32.
    """
    axes = [1, 2, 3]
    smallest = op.ReduceMin(entropy, axes, keepdims=0)
    mean = op.ReduceMean(entropy, axes, keepdims=0)
    width = op.Max(op.Sub(op.ReduceMax(entropy, axes, keepdims=0), smallest), MIN_RANGE)
    return op.Clip(op.Div(op.Sub(mean, smallest), width), 0.0, 1.0)

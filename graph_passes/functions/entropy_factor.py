"""How uncertain the rows of an attention map are, on a scale from its most to its least certain row."""

from typing import Any

from graph_passes.functions.building import Op

_MIN_RANGE = 1e-6


def entropy_factor(op: Op, entropy: Any) -> Any:
    """Mean row entropy of a sample between its smallest (0) and its largest (1), [B].

    `entropy` is [B, ...] float32 in nats, of four dimensions, one entry a head and row.
    """
    axes = [1, 2, 3]
    smallest = op.ReduceMin(entropy, axes, keepdims=0)
    mean = op.ReduceMean(entropy, axes, keepdims=0)
    width = op.Max(op.Sub(op.ReduceMax(entropy, axes, keepdims=0), smallest), _MIN_RANGE)
    return op.Clip(op.Div(op.Sub(mean, smallest), width), 0.0, 1.0)

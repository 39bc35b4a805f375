"""Emulation of a fused float16 attention kernel, and of a graph with it.

ONNX Runtime computes float16 attention in float32 on a CPU, so it does not show the rounding of a GPU kernel.
The emulation has that of flash attention: float16 queries, keys and values; logits, softmax and both sums in
float32; weights, not yet normalized, rounded to float16 for the second product; a float16 output.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

_BLOCK = 2**22
"""Logits of one head that are stored at a time."""


def fused_attention(
    q: npt.NDArray[np.float16], k: npt.NDArray[np.float16], v: npt.NDArray[np.float16], scale: float
) -> npt.NDArray[np.float16]:
    """Attention of [B, h, T, D] tensors."""
    out = np.empty((*q.shape[:3], v.shape[3]), np.float16)
    for place in np.ndindex(q.shape[:2]):
        keys, values = (x[place].astype(np.float32) for x in (k, v))
        rows = max(1, _BLOCK // len(keys))
        for begin in range(0, q.shape[2], rows):
            chunk = slice(begin, begin + rows)
            logits = q[place][chunk].astype(np.float32) @ keys.T * np.float32(scale)
            weights = np.exp(logits - logits.max(1, keepdims=True))
            sums = weights.sum(1, keepdims=True)
            out[place][chunk] = weights.astype(np.float16).astype(np.float32) @ values / sums
    return out


class Attention(OpRun):
    """The operator `Attention`: float16 as above, others as the standard says."""

    def _run(
        self, q: Any, k: Any, v: Any, *_: Any, scale: float | None = None, q_num_heads: int = 0, **__: Any
    ) -> tuple[Any]:
        if q.ndim == 3:
            split = (x.reshape(*x.shape[:2], q_num_heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v))
            (y,) = self._run(*split, scale=scale)
            return (y.transpose(0, 2, 1, 3).reshape(q.shape),)
        factor = scale or 1 / math.sqrt(q.shape[3])
        if q.dtype == np.float16:
            return (fused_attention(q, k, v, factor),)
        logits = q @ k.transpose(0, 1, 3, 2) * np.float32(factor)
        weights = np.exp(logits - logits.max(3, keepdims=True))
        return (weights / weights.sum(3, keepdims=True) @ v,)


class MatMul(OpRun):
    """The operator `MatMul`: sums of float16 products are float32, as numpy's are, which is slower by far."""

    def _run(self, a: Any, b: Any) -> tuple[Any]:
        if a.dtype == np.float16:
            return ((a.astype(np.float32) @ b.astype(np.float32)).astype(np.float16),)
        return (a @ b,)


class PairAttention(Attention):
    """The operator `Attention`: float32 operands as sums of two float16, in one attention of 3 D channels.

    q k = qh kh + qh kl + ql kh to the rounding of float32; the channels of the output are those of vh and vl.
    """

    def _run(
        self, q: Any, k: Any, v: Any, *_: Any, scale: float | None = None, q_num_heads: int = 0, **__: Any
    ) -> tuple[Any]:
        if q.dtype != np.float32 or q.ndim == 3:
            return super()._run(q, k, v, scale=scale, q_num_heads=q_num_heads)
        (qh, ql), (kh, kl), (vh, vl) = map(_pair, (q, k, v))
        query, keys = np.concatenate([qh, qh, ql], 3), np.concatenate([kh, kl, kh], 3)
        out = fused_attention(query, keys, np.concatenate([vh, vl], 3), scale or 1 / math.sqrt(q.shape[3]))
        high, low = np.split(out.astype(np.float32), 2, axis=3)
        return (high + low,)


def _pair(x: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    high = x.astype(np.float16)
    return high, (x - high.astype(np.float32)).astype(np.float16)


class Emulation:
    """A graph in ONNX's reference evaluator, each operator rounded to its own type, attention as above."""

    def __init__(self, model: ir.Model, attention: type[Attention] = Attention) -> None:
        # The evaluator finds operators by the names of their classes.
        operator = type("Attention", (attention,), {})
        self._evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=[operator, MatMul])

    def __call__(self, **inputs: Any) -> list[Any]:
        """The outputs for `inputs`."""
        return list(self._evaluator.run(None, inputs))

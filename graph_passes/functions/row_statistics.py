"""Log-sum-exps, means and KL divergences of attention rows, computed with `Attention` nodes.

A mean over the keys under the weights of a row is an attention output: E_t[d] for values d. The log-sum-exp
(LSE) of a row is read from an attention with one more key, the sentinel, whose logit c is chosen for each
row, and two more value channels: 1/T for the T real keys, and 1 for the sentinel. The ratio of these two
outputs is e^LME / e^c, where LME = LSE - log T is the logarithm of the mean of the exponentials. (LME is
near 0 for flat rows, so that small differences of their entropies are not rounded away.) The mean over the
real keys is the output of the other channels, divided by the weight of the real keys. In float32 this is
accurate for c - 60 <= LSE <= c + 80.

With K(t) = LSE(S0 + t Delta) - LSE(S0), the divergence at t is KL(t) = t E_t[Delta] - K(t). All computations
are float32, in which products of 16-bit numbers are exact.
"""

from typing import Any

import onnx_ir as ir

from graph_passes.functions.building import Op, branch, per_sample, true_for_any
from graph_passes.functions.key_guard_inputs import GuardInputs, float32_rows

FLOAT = ir.DataType.FLOAT
_BELOW_CENTER = 60.0
_READABLE_WIDTH = 130.0
_ABOVE_ROW_MEAN = 4.0
_KEY_STRIDE = 8
_MIN_SHARE = 1e-37


class RowStatistics:
    """The query rows of one site under its keys k + t d, with d = k_perm - k.

    Attributes:
        entropy: Of the plain rows in nats, less log T, [B, h, T', 1].
        log_mean: LME of the plain logits, those of centred keys, [B, h, T', 1]. This and all divergences are
            those of `kl_rows`.
    """

    def __init__(self, op: Op, inputs: GuardInputs, dtype: ir.DataType, kl_rows: Any = None) -> None:
        """Append the pass over the plain keys.

        Args:
            op: Builder.
            inputs: Queries, keys and temperature.
            dtype: Of the model's activations.
            kl_rows: Indices of the rows that the KL divergence is the mean of, [N] int64; None for all.
        """
        self._query, self._keys, self._change = float32_rows(op, inputs, dtype)
        self._padded_query = op.Pad(self._query, [0, 1], None, [3])
        self._tokens = op.Cast(op.Shape(self._keys, start=2, end=3), to=int(FLOAT))
        self._marks = _marks(op, self._keys, self._tokens)
        self._marked_keys = self._marked(op, self._keys)

        center = self._safe_center(op)
        above, mean_key, real = self._attend(op, center, self._marked_keys, self._marked_keys)
        mean = op.Div(self._logit(op, mean_key), real)
        # The second term is a lower bound, reached if one key has all the weight; it limits rounding errors.
        self.log_mean = op.Max(op.Add(center, above), op.Sub(mean, op.Log(self._tokens)))
        self.entropy = op.Sub(self.log_mean, mean)
        if kl_rows is not None:
            self._query, self._padded_query, self.log_mean = (
                op.Gather(x, kl_rows, axis=2) for x in (self._query, self._padded_query, self.log_mean)
            )

    def divergence_bound(self, op: Op, share: Any) -> Any:
        """An upper bound of the mean KL divergence at `share` [B]; [B] in nats. It needs no attention.

        KL(t) is the integral of s Var_s(Delta) over s from 0 to t. A variance is at most a quarter of the
        squared range, and the range of Delta is at most 2 |q| max |d|.
        """
        reach = self.largest_change(op, share)
        return op.Mul(op.ReduceMean(op.Mul(reach, reach), [1, 2, 3], keepdims=0), 0.5)

    def largest_change(self, op: Op, share: Any) -> Any:
        """An upper bound of the change of the logits at `share` [B], for each row, [B, h, T', 1]."""
        reach = op.Mul(_length(op, self._query), _longest(op, self._change))
        return op.Mul(per_sample(op, share, 4), reach)

    def divergence(self, op: Op, last_share: Any) -> "Divergence":
        """The mean KL divergence as a function of t; appends the nodes that its evaluations share.

        Args:
            op: Builder.
            last_share: Largest t that will be evaluated, [B]: branches make it accurate for any logits.
        """
        return Divergence(self, op, last_share)

    def _safe_center(self, op: Op) -> Any:
        """c for any logits: from bounds of the LSE, from tighter bounds, or from a pass over the keys."""
        highest = op.Mul(_length(op, self._query), _longest(op, self._keys))
        lowest = branch(
            op,
            true_for_any(op, op.Greater(highest, _READABLE_WIDTH)),
            self._highest_of_some,
            lambda inner: inner.Mul(highest, 0.0),
            1,
        )
        width = op.Sub(highest, lowest)
        return branch(
            op,
            true_for_any(op, op.Greater(width, _READABLE_WIDTH)),
            lambda inner: self._center_by_mean(inner, self._keys),
            lambda inner: inner.Add(lowest, inner.Mul(width, _BELOW_CENTER / _READABLE_WIDTH)),
            1,
        )

    def _highest_of_some(self, op: Op) -> Any:
        """The highest logit of every eighth key, at least the mean logit: a lower bound of the LSE."""
        some = op.Transpose(op.Slice(self._keys, [0], [2**31], [2], [_KEY_STRIDE]), perm=[0, 1, 3, 2])
        return op.Max(op.ReduceMax(op.MatMul(self._query, some), [3], keepdims=1), 0.0)

    def _center_by_mean(self, op: Op, keys: Any) -> Any:
        """c from the mean logit under the weights of the row, which is at most log(T) below the LSE."""
        mean_key = attention(op, self._query, keys, keys)
        return op.Add(self._logit(op, mean_key), _ABOVE_ROW_MEAN)

    def _logit(self, op: Op, key: Any) -> Any:
        """The logits of each row for one key per row, [B, h, T', 1]."""
        return op.ReduceSum(op.Mul(self._query, key), [3], keepdims=1)

    def _marked(self, op: Op, x: Any) -> Any:
        """x [B, h, T, D] with a sentinel of zeros, and with the two channels of `_marks`."""
        return op.Concat(op.Pad(x, [0, 1], None, [2]), self._marks, axis=3)

    def _attend(self, op: Op, center: Any, keys: Any, values: Any) -> tuple[Any, Any, Any]:
        """Attention over marked keys whose sentinel has the logit c = `center` [B, h, T', 1].

        Returns:
            LME - c, the output without the marks, and the weight of the real keys, by which the output must
            be divided.
        """
        out = attention(op, op.Concat(self._padded_query, center, axis=3), keys, values)
        marks = op.Max(op.Slice(out, [-2], [2**31], [3]), _MIN_SHARE)
        real, sentinel = op.Split(marks, num_outputs=2, axis=3, _outputs=2)
        mean = op.Slice(out, [0], [-2], [3])
        return op.Log(op.Div(real, sentinel)), mean, op.Mul(real, self._tokens)


class Divergence:
    """The mean KL divergence of the rows with mixed keys from the rows with plain keys."""

    def __init__(self, rows: RowStatistics, op: Op, last_share: Any) -> None:
        self._rows = rows
        self._marked_change = rows._marked(op, rows._change)
        self._key_change = op.Pad(rows._change, [0, 0, 1, 2], None, [2, 3])
        largest = rows.largest_change(op, last_share)
        self._extreme = true_for_any(op, op.Greater(largest, _BELOW_CENTER))

    def __call__(self, op: Op, share: Any) -> Any:
        """The divergence at t = `share` [B]; [B] in nats."""
        spread = per_sample(op, share, 4)
        growth, change, real = self._attend(op, spread, self._marked_change)
        return self._mean(op, spread, growth, change, real)

    def with_output(self, op: Op, share: Any, values: Any) -> tuple[Any, Any]:
        """The divergence, and the attention output [B, h, T', D] for `values` [B, h, T, D]."""
        spread = per_sample(op, share, 4)
        carried = op.Concat(op.Pad(values, [0, 1], None, [2]), self._marked_change, axis=3)
        growth, out, real = self._attend(op, spread, carried)
        output, change = op.Split(out, num_outputs=2, axis=3, _outputs=2)
        return self._mean(op, spread, growth, change, real), op.Div(output, real)

    def _attend(self, op: Op, spread: Any, values: Any) -> tuple[Any, Any, Any]:
        rows = self._rows
        keys = op.Add(rows._marked_keys, op.Mul(spread, self._key_change))

        def by_mean(op: Op) -> Any:
            return rows._center_by_mean(op, op.Slice(keys, [0, 0], [-1, -2], [2, 3]))

        center = branch(op, self._extreme, by_mean, lambda _: rows.log_mean, 1)
        above, out, real = rows._attend(op, center, keys, values)
        return op.Add(above, op.Sub(center, rows.log_mean)), out, real

    def _mean(self, op: Op, spread: Any, growth: Any, change: Any, real: Any) -> Any:
        mean_change = op.Div(self._rows._logit(op, change), real)
        return op.ReduceMean(op.Sub(op.Mul(spread, mean_change), growth), [1, 2, 3], keepdims=0)


def attention(op: Op, q: Any, k: Any, v: Any) -> Any:
    """`Attention` of [B, h, T, D] tensors with scaled queries."""
    return op.Attention(q, k, v, scale=1.0)


def _marks(op: Op, keys: Any, tokens: Any) -> Any:
    """Two channels [B, h, T + 1, 2]: 1/T for each real key, and 1 for the sentinel, which is the last key."""
    nothing = op.Mul(op.Slice(keys, [0], [1], [3]), 0.0)
    sentinel = op.Pad(nothing, [0, 1], 1.0, [2])
    return op.Concat(op.Div(op.Sub(1.0, sentinel), tokens), sentinel, axis=3)


def _length(op: Op, x: Any) -> Any:
    """Euclidean lengths of the vectors of [B, h, T, D], [B, h, T, 1]."""
    return op.ReduceL2(x, [3], keepdims=1)


def _longest(op: Op, x: Any) -> Any:
    """The largest length of the vectors of each head, [B, h, 1, 1]."""
    return op.ReduceMax(_length(op, x), [2], keepdims=1)

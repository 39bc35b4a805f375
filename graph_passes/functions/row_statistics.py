"""Log-sum-exps, means and divergences of attention rows from `Attention` nodes alone.

Means over the keys are attention outputs, E_t[d] for values d. So is the log-sum-exp of a row: with one more
key, the sentinel, whose logit is a number c of the row's own, and two more value channels, 1/T for the T real
keys and 1 for the sentinel, the ratio of their outputs is e^LME / e^c, where LME = LSE - log T is the
logarithm of the mean of the exponentials; near 0 for flat rows, whose entropies differ by little. The mean is
the output of the other channels divided by the share of the real keys. float32 holds all this as long as
LSE lies at most 60 nats below c and 80 above.

With K(t) = LSE(S0 + t Delta) - LSE(S0), the divergence at t is KL(t) = t E_t[Delta] - K(t): exact wherever it
is evaluated. Everything is float32, in which products of 16-bit numbers are exact.
"""

from typing import Any

import onnx_ir as ir

from graph_passes.functions.building import Op, branch, cast, per_sample, split_heads, true_for_any
from graph_passes.functions.key_guard_inputs import GuardInputs

FLOAT = ir.DataType.FLOAT
_BELOW_CENTER = 60.0
_READABLE_WIDTH = 130.0
_ABOVE_ROW_MEAN = 4.0
_KEY_STRIDE = 8
_MIN_SHARE = 1e-37


class RowStatistics:
    """The query rows of one site under its keys k + t d, with d = k_perm - k.

    Attributes:
        log_mean: LME of the plain logits, those of centred keys, [B, h, T', 1].
        entropy: Of the plain rows in nats, less log T, [B, h, T', 1].
    """

    def __init__(self, op: Op, inputs: GuardInputs, dtype: ir.DataType, *, branches: bool) -> None:
        """Append the pass over the plain keys.

        Args:
            op: Builder.
            inputs: Queries, keys and temperature.
            dtype: Of the model's activations.
            branches: Read rows of any logits, with branches for extreme ones. Without, a row is misread
                whose largest logit lies 140 nats above both the mean logit and every eighth key.
        """
        wide_k = cast(op, inputs.k, FLOAT, dtype)
        scale = op.Constant(value_float=ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT))
        factor = op.Div(scale, per_sample(op, inputs.tau_q, 3))
        self._query = split_heads(op, op.Mul(cast(op, inputs.q, FLOAT, dtype), factor))
        self._padded_query = op.Pad(self._query, [0, 1], None, [3])
        # A vector added to all keys changes no weight; the mean logit of centred keys is 0.
        self._keys = split_heads(op, op.Sub(wide_k, op.ReduceMean(wide_k, [1], keepdims=1)))
        self._change = split_heads(op, op.Sub(cast(op, inputs.k_perm, FLOAT, dtype), wide_k))
        self._tokens = op.Cast(op.Shape(self._keys, start=2, end=3), to=int(FLOAT))
        self._marks = _marks(op, self._keys, self._tokens)
        self._marked_keys = self._marked(op, self._keys)

        center = self._safe_center(op) if branches else self._likely_center(op)
        above, mean_key, real = self._attend(op, center, self._marked_keys, self._marked_keys)
        mean = op.Div(self._logit(op, mean_key), real)
        # Rounding aside, only a row of which one key has all weight reaches the other term.
        self.log_mean = op.Max(op.Add(center, above), op.Sub(mean, op.Log(self._tokens)))
        self.entropy = op.Sub(self.log_mean, mean)

    def divergence_bound(self, op: Op, share: Any) -> Any:
        """What the mean KL divergence at `share` [B] cannot exceed, [B]; it takes no attention.

        KL(t) is the integral of s Var_s(Delta) over s from 0 to t; a variance is at most a quarter of the
        squared range, and the range of Delta at most 2 |q| max |d| times the scale of the logits.
        """
        reach = self.largest_change(op, share)
        return op.Mul(op.ReduceMean(op.Mul(reach, reach), [1, 2, 3], keepdims=0), 0.5)

    def largest_change(self, op: Op, share: Any) -> Any:
        """What no logit changes by more than at `share` [B], for each row, [B, h, T', 1]."""
        reach = op.Mul(_length(op, self._query), _longest(op, self._change))
        return op.Mul(per_sample(op, share, 4), reach)

    def divergence(self, op: Op, last_share: Any = None) -> "Divergence":
        """The mean KL divergence as a function of t; appends what its evaluations share.

        Without `last_share` [B] it is for changes of the logits below 60 nats; with it, for shares up to
        that one and any logits, with branches.
        """
        return Divergence(self, op, last_share)

    def _safe_center(self, op: Op) -> Any:
        """A center for any logits: from bounds, from closer bounds, or from a pass over the keys."""
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

    def _likely_center(self, op: Op) -> Any:
        return op.Add(self._highest_of_some(op), _BELOW_CENTER)

    def _highest_of_some(self, op: Op) -> Any:
        """The highest logit of every eighth key, and at least the mean logit: not above the LSE."""
        some = op.Transpose(op.Slice(self._keys, [0], [2**31], [2], [_KEY_STRIDE]), perm=[0, 1, 3, 2])
        return op.Max(op.ReduceMax(op.MatMul(self._query, some), [3], keepdims=1), 0.0)

    def _center_by_mean(self, op: Op, keys: Any) -> Any:
        """From the mean logit under the row's own weights, which lies at most log(T) below the LSE."""
        mean_key = attention(op, self._query, keys, keys)
        return op.Add(self._logit(op, mean_key), _ABOVE_ROW_MEAN)

    def _logit(self, op: Op, key: Any) -> Any:
        """The logit of each row for a key of its own, [B, h, T', 1]."""
        return op.ReduceSum(op.Mul(self._query, key), [3], keepdims=1)

    def _marked(self, op: Op, x: Any) -> Any:
        """x [B, h, T, D] with a sentinel of zeros and the two channels that tell it from the others."""
        return op.Concat(op.Pad(x, [0, 1], None, [2]), self._marks, axis=3)

    def _attend(self, op: Op, center: Any, keys: Any, values: Any) -> tuple[Any, Any, Any]:
        """Attention over marked keys whose sentinel has the logit `center` [B, h, T', 1].

        Returns what the LME has above the center, the output without its marks, and the share of the real
        keys, by which the output is to be divided.
        """
        out = attention(op, op.Concat(self._padded_query, center, axis=3), keys, values)
        marks = op.Max(op.Slice(out, [-2], [2**31], [3]), _MIN_SHARE)
        real, sentinel = op.Split(marks, num_outputs=2, axis=3, _outputs=2)
        mean = op.Slice(out, [0], [-2], [3])
        return op.Log(op.Div(real, sentinel)), mean, op.Mul(real, self._tokens)


class Divergence:
    """The mean KL divergence of the rows under mixed keys to those under plain ones."""

    def __init__(self, rows: RowStatistics, op: Op, last_share: Any) -> None:
        self._rows = rows
        self._marked_change = rows._marked(op, rows._change)
        self._key_change = op.Pad(rows._change, [0, 0, 1, 2], None, [2, 3])
        self._extreme = None
        if last_share is not None:
            largest = rows.largest_change(op, last_share)
            self._extreme = true_for_any(op, op.Greater(largest, _BELOW_CENTER))

    def __call__(self, op: Op, share: Any) -> Any:
        """At t = `share` [B]; [B] in nats."""
        spread = per_sample(op, share, 4)
        growth, change, real = self._attend(op, spread, self._marked_change)
        return self._mean(op, spread, growth, change, real)

    def with_output(self, op: Op, share: Any, values: Any) -> tuple[Any, Any]:
        """The same, and the attention's output for `values` [B, h, T, D], [B, h, T', D]."""
        spread = per_sample(op, share, 4)
        carried = op.Concat(op.Pad(values, [0, 1], None, [2]), self._marked_change, axis=3)
        growth, out, real = self._attend(op, spread, carried)
        output, change = op.Split(out, num_outputs=2, axis=3, _outputs=2)
        return self._mean(op, spread, growth, change, real), op.Div(output, real)

    def _attend(self, op: Op, spread: Any, values: Any) -> tuple[Any, Any, Any]:
        rows = self._rows
        keys = op.Add(rows._marked_keys, op.Mul(spread, self._key_change))
        if self._extreme is None:
            return rows._attend(op, rows.log_mean, keys, values)

        def by_mean(op: Op) -> Any:
            return rows._center_by_mean(op, op.Slice(keys, [0, 0], [-1, -2], [2, 3]))

        center = branch(op, self._extreme, by_mean, lambda _: rows.log_mean, 1)
        above, out, real = rows._attend(op, center, keys, values)
        return op.Add(above, op.Sub(center, rows.log_mean)), out, real

    def _mean(self, op: Op, spread: Any, growth: Any, change: Any, real: Any) -> Any:
        mean_change = op.Div(self._rows._logit(op, change), real)
        return op.ReduceMean(op.Sub(op.Mul(spread, mean_change), growth), [1, 2, 3], keepdims=0)


def attention(op: Op, q: Any, k: Any, v: Any) -> Any:
    """Fused attention of [B, h, T, D] tensors whose queries are scaled."""
    return op.Attention(q, k, v, scale=1.0)


def _marks(op: Op, keys: Any, tokens: Any) -> Any:
    """Two channels [B, h, T + 1, 2]: 1/T for each real key, and 1 for the sentinel behind them."""
    nothing = op.Mul(op.Slice(keys, [0], [1], [3]), 0.0)
    sentinel = op.Pad(nothing, [0, 1], 1.0, [2])
    return op.Concat(op.Div(op.Sub(1.0, sentinel), tokens), sentinel, axis=3)


def _length(op: Op, x: Any) -> Any:
    """Euclidean lengths of the vectors of [B, h, T, D], [B, h, T, 1]."""
    return op.ReduceL2(x, [3], keepdims=1)


def _longest(op: Op, x: Any) -> Any:
    """The largest length of a head's vectors, [B, h, 1, 1]."""
    return op.ReduceMax(_length(op, x), [2], keepdims=1)

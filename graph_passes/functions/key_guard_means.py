"""The branchless key guard: `sws.KeyGuard` from means of the change of the logits.

With K'(s) = E_s[Delta], the mean change of the logits under the weights of keys k + s d, d = k_perm - k,

    KL(t) = t K'(t) - integral of K'(s) from 0 to t.

K' averaged over rows and heads is an attention output with values d, followed by a dot product with q. Three
sample points s = 0, L/2 and L, with L the last step of the grid, give a quadratic K' and from it KL at every
step. Neither a log-sum-exp nor a materialized logit is needed, and the rounding of 16-bit outputs averages
out. See docs/method.md, third identity.

The curvature of K', K'(L/2) - (K'(0) + K'(L)) / 2, is a correction of a few percent. It is the mean over
about `CURVATURE_ROWS` rows of all heads, which makes the attention at L/2 nearly free.

`AttentionRows` uses fused attention: float16 on a GPU, in a bfloat16 model too, since float16 has three more
bits and keys and queries are far from its range. `MaterializedRows` computes the same in float32 from
materialized logits, for sites with few tokens and for runtimes without float32 attention.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.functions.building import (
    Op,
    after,
    attribute_int,
    cast,
    logit_factor,
    per_sample,
    split_heads,
)
from graph_passes.functions.entropy_factor import entropy_factor
from graph_passes.functions.key_guard_inputs import GuardInputs, float32_rows
from graph_passes.parameters import SwsParameters

FLOAT = ir.DataType.FLOAT

KEY_CHANNELS = 8
"""Channels added to keys and values of the attention with a sentinel; head sizes are multiples of 8."""
CURVATURE_ROWS = 1024
"""Rows of all heads together, about, that the curvature of K' is the mean of, if there are more."""
_FIRST = [1] + [0] * (KEY_CHANNELS - 1)
_MIN_WEIGHT = 1e-4
_LARGEST_LOG = 40.0


class Rows(Protocol):
    """The query rows of one site under its keys k + s d.

    Attributes:
        unit: Of all slopes, float32, broadcast to [B, 1, 1, 1]: 1 is this many nats.
        entropy: Of the plain rows in nats, [B, h, T', 1] float32.
    """

    unit: Any
    entropy: Any

    def slopes(self, op: Op, last: Any) -> Any:
        """L K'(s) for L = `last`, [B, 1, 1, 5] float32.

        K'(0) as the mean over all rows and over those of the curvature (`CurvatureRows`), K'(L) as both
        likewise, and K'(L/2) over those of the curvature. If the KL divergence is that of some rows, these
        are all rows. L is rounded alike everywhere, since differences matter: at a small L they are far
        smaller.
        """


def means_guard(
    op: Op,
    parameters: SwsParameters,
    inputs: GuardInputs,
    rows: Rows,
) -> tuple[Any, Any]:
    """alpha_k and a_v, [B] float32 each.

    Args:
        op: Builder of a function with the attribute `num_heads`.
        parameters: Constants of the method.
        inputs: Of `sws.KeyGuard`; its keys are not read.
        rows: The statistics of its rows.
    """
    mix = op.Clip(op.Mul(inputs.amplitude, entropy_factor(op, rows.entropy)), 0.0, 1.0)
    steps = 2**parameters.bisection_steps
    last_step = op.Mul(mix, op.Mul(inputs.key_gate, parameters.key_cap * (steps - 1) / steps))
    slopes = rows.slopes(op, per_sample(op, last_step, 4))

    weights = op.Constant(value=ir.tensor(_divergence_weights(steps), name="divergence_weights"))
    # Not MatMul: its operands may be rounded to TensorFloat-32.
    divergence = op.ReduceSum(op.Mul(slopes, weights), [3], keepdims=1)
    budget = op.Div(per_sample(op, inputs.kappa, 4), rows.unit)
    allowed = op.Cast(op.Less(divergence, budget), to=int(FLOAT))
    alpha_k = op.Mul(last_step, op.ReduceMean(allowed, [1, 2, 3], keepdims=0))
    a_v = op.Mul(mix, inputs.value_gain)
    # g(u) is at most 1.
    return alpha_k, a_v if parameters.value_cap <= 1 else op.Clip(a_v, 0.0, 1.0)


def _divergence_weights(steps: int) -> npt.NDArray[np.float32]:
    """Weights [1, 1, steps - 1, 5] of the slopes (see `Rows`) in KL at the steps 1 to steps - 1.

    With x = t / L and K' = K'(0) + c1 x + c2 x^2, KL = L (c1 x^2 / 2 + 2 c2 x^3 / 3). The curvature is
    -c2 / 4, and K'(L) - K'(0) is c1 + c2.
    """
    x = np.arange(1, steps) / (steps - 1)
    change, curvature = x**2 / 2, 2 * x**2 - 8 * x**3 / 3
    weights = [-change, -curvature / 2, change, -curvature / 2, curvature]
    return np.stack(weights, axis=1).astype(np.float32)[None, None]


class CurvatureRows:
    """The rows that the curvature of K' is the mean of: every n-th one.

    n is odd, so that they are in all columns of a grid whose width is a power of two.
    """

    def __init__(self, op: Op, rows: Any) -> None:
        """Append their indices [N] int32, of `rows` [1] int64. The function has the attribute `num_heads`."""
        of_all_heads = op.Mul(rows, attribute_int(op, "num_heads"))
        stride = op.Add(op.Mul(op.Div(of_all_heads, [2 * CURVATURE_ROWS]), [2]), [1])
        start, every = op.Squeeze(op.Div(stride, [2]), [0]), op.Squeeze(stride, [0])
        numbers = op.Range(0, op.Squeeze(rows, [0]), 1)
        chosen = op.Cast(op.Equal(op.Mod(numbers, every), start), to=int(FLOAT))
        columns = (op.Add(op.Mul(chosen, 0.0), 1.0), op.Div(chosen, op.ReduceMean(chosen, [0])))
        # TensorRT casts indices that are not int32.
        self._rows = op.Cast(op.Range(start, op.Squeeze(rows, [0]), every), to=int(ir.DataType.INT32))
        self._weights = op.Concat(*(op.Unsqueeze(column, [0, 1, 3]) for column in columns), axis=3)

    def of(self, op: Op, x: Any) -> Any:
        """These rows of x [B, h, T', D]."""
        return op.Gather(x, self._rows, axis=2)

    def means(self, op: Op, x: Any) -> Any:
        """Of x [B, h, T', 1] float32, the means over all rows and over these, [B, 1, 1, 2]."""
        return op.ReduceMean(op.Mul(x, self._weights), [1, 2], keepdims=1)


class AttentionRows:
    """Rows from fused attention: two here, and one for each further sample point.

    The first attention gives the mean logit E_0[S] of each row under its weights. The second has one more
    key, the sentinel, whose logit is a level c of the row, and more value channels, which give the weight w
    of the real keys. log(w / (1 - w)) = LSE - c, and with it the entropy LSE - E_0[S].

    LSE lies between E_0[S] and that plus log T. The level is in the middle, so that w and 1 - w are at least
    about T^-1/2, far from the smallest float16 numbers. In a flat row, whose logits are equal, w / (1 - w) is
    r = T^1/2. There are channels -w, which has its relative precision in peaked rows, and r (1 - w) - w,
    which has it in flat ones: their entropies are nearly equal, and the entropy factor is relative to the
    difference. They are the lowest and the highest of all channels.
    """

    def __init__(
        self,
        op: Op,
        q: Any,
        keys: Any,
        change: Any,
        tau_q: Any,
        dtype: ir.DataType,
        operands: ir.DataType,
        kl_rows: Any = None,
    ) -> None:
        """Append both attentions.

        Args:
            op: Builder of a function with the attributes `num_heads` and `scale`.
            q: Queries before their temperature, [B, T', C] of `dtype`.
            keys: [B, h, T, D] of `operands`.
            change: d, as `keys`.
            tau_q: Temperature of the queries, [B] float32.
            dtype: Of the model's activations.
            operands: Dtype of the attentions, float16 or float32.
            kl_rows: Indices of the rows that K' is the mean of, [N] int64; None for all.
        """
        self._operands = operands
        factor = logit_factor(op, tau_q)
        # Products have q instead of the scaled queries. These are then operands of attentions only, and an
        # engine keeps no second copy of them in another layout.
        self._q = split_heads(op, cast(op, q, operands, dtype))
        self._factor = cast(op, factor, operands, FLOAT)
        self._query = op.Mul(self._q, self._factor)
        # The factor as it was rounded for the scaled queries, so that mean logits have the temperature of the
        # weights. It is positive, and an optimizer may remove a Cast together with the one back.
        self.unit = self._upcast(op, op.Max(self._factor, self._constant(op, [0.0], "zero")))
        self._keys = keys
        self._change = change

        mean = _attention(op, self._query, self._keys, self._keys)
        # Multiplied in float32: a peaked row has large logits and a low entropy, and the entropy factor is
        # relative to the lowest one.
        products = op.Mul(self._upcast(op, self._q), self._upcast(op, mean))
        mean_logit = op.Mul(op.ReduceSum(products, [3], keepdims=1), self.unit)

        tokens = op.Shape(self._keys, start=2, end=3)
        root = op.Sqrt(op.Cast(tokens, to=int(FLOAT)))
        half_log, root = (cast(op, x, operands, FLOAT) for x in (op.Log(root), root))
        # Computed in the dtype of the operands, not rounded by a Cast, which an optimizer may remove together
        # with the one back.
        level = op.Add(cast(op, mean_logit, operands, FLOAT), half_log)
        weight, log_ratio, change_logit = self._with_sentinel(op, tau_q, level, root)
        self.entropy = op.Add(op.Sub(self._upcast(op, level), mean_logit), log_ratio)
        slope = op.Div(change_logit, weight)
        if kl_rows is not None:
            slope, self._q, self._query = (
                op.Gather(x, kl_rows, axis=2) for x in (slope, self._q, self._query)
            )
        self._some = CurvatureRows(op, op.Shape(self._q, start=2, end=3))
        self._initial = self._some.means(op, slope)

    def slopes(self, op: Op, last: Any) -> Any:
        """See `Rows`. The values are the change L d as it was rounded for the keys."""
        # The output with the sentinel is not kept until the slopes are known. Also, an optimizer may remove a
        # Cast together with the one back.
        known = cast(op, op.ReduceMean(self._initial, [3], keepdims=1), self._operands, FLOAT)
        rounded = after(op, cast(op, last, self._operands, FLOAT), known, self._operands)
        initial = op.Mul(self._upcast(op, rounded), self._initial)
        change = op.Mul(self._change, rounded)
        end = _attention(op, self._query, op.Add(self._keys, change), change)
        half = op.Mul(change, self._constant(op, [0.5], "half"))
        q, query = (self._some.of(op, x) for x in (self._q, self._query))
        middle = self._dot(op, q, _attention(op, query, op.Add(self._keys, half), change))
        return op.Concat(
            initial,
            self._some.means(op, self._dot(op, self._q, end)),
            op.ReduceMean(middle, [1, 2], keepdims=1),
            axis=3,
        )

    def _with_sentinel(self, op: Op, per_batch: Any, level: Any, root: Any) -> tuple[Any, Any, Any]:
        """The attention with a sentinel.

        Args:
            op: Builder.
            per_batch: Any tensor [B]. Shapes are made of it, so that all sites of a size share the sentinel.
            level: c, [B, h, T', 1].
            root: r, [1].

        Returns:
            The weight w of the real keys, log(w / (1 - w)), and the sum of q . d over the real keys under
            the weights of all keys, in `unit`; [B, h, T', 1] float32 each.
        """
        outer = op.Concat(op.Shape(per_batch), attribute_int(op, "num_heads"), axis=0)
        raised = op.Mul(level, self._constant(op, _FIRST, "first"))
        # Not the scaled queries: a runtime would keep them in one more layout for this.
        channels = op.Concat([1, 1, 1], op.Shape(self._q, start=3, end=4), axis=0)
        ones = self._constant(op, [1.0] * KEY_CHANNELS, "unscaled")
        batch = op.Concat(op.Shape(per_batch), [1, 1, 1], axis=0)
        factors = op.Concat(op.Expand(self._factor, channels), op.Expand(ones, batch), axis=3)
        query = op.Mul(op.Concat(self._q, raised, axis=3), factors)
        size = op.Concat(outer, [1], op.Shape(self._keys, start=3, end=4), axis=0)
        nothing = op.Expand(self._constant(op, [0], "nothing"), size)

        def marked(marks: Any, tokens: Any) -> Any:
            return op.Expand(marks, op.Concat(outer, tokens, [KEY_CHANNELS], axis=0))

        # Not Concat: the zeros would be a constant of the graph. With the marks of the values by Pad, too, an
        # engine keeps more tensors.
        sentinel = op.Concat(nothing, marked(self._constant(op, _FIRST, "first"), [1]), axis=3)
        keys = op.Concat(op.Pad(self._keys, [0] * 7 + [KEY_CHANNELS]), sentinel, axis=2)
        # -1 for the real keys; 0 and r in turn for the sentinel.
        marks = op.Mul(root, self._constant(op, [0, 1] * (KEY_CHANNELS // 2), "every_second"))
        real = marked(self._constant(op, [-1], "minus_one"), op.Shape(self._keys, start=2, end=3))
        marks = op.Concat(real, marked(marks, [1]), axis=2)
        values = op.Concat(op.Concat(self._change, nothing, axis=2), marks, axis=3)

        out = _attention(op, query, keys, values)
        sizes = op.Concat(op.Shape(self._keys, start=3, end=4), [KEY_CHANNELS], axis=0)
        mean, marks = op.Split(out, sizes, axis=3, _outputs=2)
        marks = self._upcast(op, marks)
        # Not Split into channels, for which an engine copies the output.
        lowest, highest = (reduce(marks, [3], keepdims=1) for reduce in (op.ReduceMin, op.ReduceMax))
        # As it was rounded for the marks: see `unit`.
        root = self._upcast(op, op.Max(root, self._constant(op, [0], "zero")))
        # w and 1 - w, both times 1 + r.
        scale = op.Add(root, 1.0)
        weight = op.Where(
            op.Less(highest, op.Mul(root, 0.5)), op.Sub(root, highest), op.Mul(lowest, op.Neg(scale))
        )
        weight, rest = op.Max(weight, _MIN_WEIGHT), op.Add(highest, 1.0)
        log_ratio = op.Clip(op.Log(op.Div(weight, rest)), -_LARGEST_LOG, _LARGEST_LOG)
        return op.Div(weight, scale), log_ratio, self._dot(op, self._q, mean)

    def _dot(self, op: Op, q: Any, x: Any) -> Any:
        """Dot products of the vectors of q and x [B, h, T', D]: [B, h, T', 1] float32.

        Channels are multiplied in the dtype of the operands: a float32 copy of each operand would take twice
        its memory. The rounding of a product is as small as that of an attention output.
        """
        return op.ReduceSum(self._upcast(op, op.Mul(q, x)), [3], keepdims=1)

    def _upcast(self, op: Op, value: Any) -> Any:
        return cast(op, value, FLOAT, self._operands)

    def _constant(self, op: Op, values: Sequence[float], name: str) -> Any:
        """A constant [1, 1, 1, n] of the dtype of the operands."""
        array = np.array(values, self._operands.numpy())
        return op.Constant(value=ir.tensor(array[None, None, None], name=name))


class MaterializedRows:
    """Rows from float32 products and a softmax, which materialize the logits of one attention at a time.

    No sentinel is needed: with m the largest logit of a row and w its weight, LSE = m - log w.
    """

    def __init__(
        self, op: Op, inputs: GuardInputs, dtype: ir.DataType, kl_rows: Any = None, *, small: bool = False
    ) -> None:
        """Append the pass over the plain keys.

        Args:
            op: Builder.
            inputs: Queries, keys and temperature.
            dtype: Of the model's activations.
            kl_rows: As for `AttentionRows`.
            small: The site has so few tokens that the weights of two passes may be kept.
        """
        self._small = small
        self._query, self._keys, self._change = float32_rows(op, inputs, dtype)
        self.unit = 1.0
        logits, weights = self._weights(op, self._query, self._keys)
        highest, largest = (op.ReduceMax(rows, [3], keepdims=1) for rows in (logits, weights))
        mean_logit = self._dot(op, self._query, op.MatMul(weights, self._keys))
        self.entropy = op.Sub(op.Sub(highest, op.Log(largest)), mean_logit)
        slope = self._dot(op, self._query, op.MatMul(weights, self._change))
        if kl_rows is not None:
            slope, self._query = (op.Gather(x, kl_rows, axis=2) for x in (slope, self._query))
        self._some = CurvatureRows(op, op.Shape(self._query, start=2, end=3))
        self._initial = self._some.means(op, slope)

    def slopes(self, op: Op, last: Any) -> Any:
        """See `Rows`."""
        if not self._small:
            # The weights of the plain rows are not kept until the slopes are known.
            last = after(op, last, op.ReduceMean(self._initial, [3], keepdims=1))
        change = op.Mul(self._change, last)
        query = self._some.of(op, self._query)
        middle, end = (
            self._dot(op, q, op.MatMul(self._weights(op, q, op.Add(self._keys, step))[1], change))
            for q, step in ((query, op.Mul(change, 0.5)), (self._query, change))
        )
        return op.Concat(
            op.Mul(last, self._initial),
            self._some.means(op, end),
            op.ReduceMean(middle, [1, 2], keepdims=1),
            axis=3,
        )

    def _weights(self, op: Op, q: Any, keys: Any) -> tuple[Any, Any]:
        # Not Transpose and MatMul: see decompose_metrics_attention.
        logits = op.Einsum(q, keys, equation="bhqd,bhkd->bhqk")
        return logits, op.Softmax(logits, axis=-1)

    def _dot(self, op: Op, q: Any, x: Any) -> Any:
        """Dot products of the vectors of q and x [B, h, T', D]: [B, h, T', 1]."""
        return op.ReduceSum(op.Mul(q, x), [3], keepdims=1)


def _attention(op: Op, q: Any, k: Any, v: Any) -> Any:
    """`Attention` of [B, h, T, D] tensors with scaled queries.

    TensorRT multiplies queries and keys by the square root of a scale in their own type; 1 is exact.
    """
    return op.Attention(q, k, v, scale=1.0)

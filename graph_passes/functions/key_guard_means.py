"""The key guard without branches: `sws.KeyGuard` from means of the change of the logits.

With K'(s) = E_s[Delta], the mean change of the logits under the weights of keys k + s d, d = k_perm - k,

    KL(t) = t K'(t) - integral of K'(s) from 0 to t.

K' averaged over rows and heads is an attention output with values d, followed by a dot product with q. Three
nodes s = 0, L/2 and L, with L the last step of the grid, give a quadratic K' and from it KL at every step.
Neither a log-sum-exp nor a stored logit is needed, and the rounding of 16-bit outputs averages out. See
docs/method.md, third identity.

`AttentionRows` uses fused attention: float16 on a GPU, in a bfloat16 model too, since float16 has three more
bits and keys and queries are far from its range. `StoredRows` computes the same in float32 from stored
logits, for sites with few tokens and for runtimes without float32 attention.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.functions.building import Op, attribute_int, cast, per_sample, split_heads
from graph_passes.functions.entropy_factor import entropy_factor
from graph_passes.functions.key_guard_inputs import GuardInputs, float32_rows
from graph_passes.parameters import SwsParameters

FLOAT = ir.DataType.FLOAT

KEY_CHANNELS = 8
"""Channels added to keys and values of the attention with a sentinel; head sizes are multiples of 8."""
_MIN_WEIGHT = 1e-4
_LARGEST_LOG = 40.0


class Rows(Protocol):
    """The query rows of one site under its keys k + s d.

    Attributes:
        entropy: Of the plain rows in nats, [B, h, T', 1] float32.
    """

    entropy: Any

    def slopes(self, op: Op, last: Any) -> tuple[Any, Any, Any]:
        """L K'(0), L K'(L/2) / D and L K'(L) / D for L = `last`; all [B, 1, 1, 1] float32.

        K' is the mean over all rows, or over those that the KL divergence is evaluated on. The last two are
        means over channels, too: one reduction instead of a sum over the D channels and a mean. L is rounded
        alike in all three, since their differences matter: at a small L they are far smaller.
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
    last = per_sample(op, last_step, 4)
    slopes = op.Concat(*rows.slopes(op, last), axis=2)

    head_size = op.Div(op.Shape(inputs.q, start=2, end=3), attribute_int(op, "num_heads"))
    channels = op.Cast(op.Concat([1], head_size, head_size, axis=0), to=int(FLOAT))
    weights = op.Constant(value=ir.tensor(_divergence_weights(steps), name="divergence_weights"))
    # Not MatMul: its operands may be rounded to TensorFloat-32.
    terms = op.Mul(slopes, op.Mul(weights, op.Unsqueeze(channels, [0, 1, 3])))
    divergence = op.ReduceSum(terms, [2], keepdims=1)
    allowed = op.Cast(op.Less(divergence, per_sample(op, inputs.kappa, 4)), to=int(FLOAT))
    alpha_k = op.Mul(last_step, op.ReduceMean(allowed, [1, 2, 3], keepdims=0))
    a_v = op.Mul(mix, inputs.value_gain)
    # g(u) is at most 1.
    return alpha_k, a_v if parameters.value_cap <= 1 else op.Clip(a_v, 0.0, 1.0)


def _divergence_weights(steps: int) -> npt.NDArray[np.float32]:
    """Weights [1, 1, 3, steps - 1] of L K'(0), L K'(L/2) and L K'(L) in KL at the steps 1 to steps - 1.

    With x = t / L and K' = K'(0) + c1 x + c2 x^2, KL = L (c1 x^2 / 2 + 2 c2 x^3 / 3).
    """
    x = np.arange(1, steps) / (steps - 1)
    middle, last = 2 * x**2 - 8 * x**3 / 3, -(x**2) / 2 + 4 * x**3 / 3
    return np.stack([-middle - last, middle, last]).astype(np.float32)[None, None]


class AttentionRows:
    """Rows from fused attention: two here, and one for each further node.

    Keys are centred: a vector added to all keys does not change the weights, and the mean logit is then 0.
    The first attention gives the mean logit E_0[S] of each row under its weights. The second has one more
    key, the sentinel, whose logit is a level c of the row, and more value channels, which give the weight w
    of the real keys. log(w / (1 - w)) = LSE - c, and with it the entropy LSE - E_0[S].

    LSE lies between E_0[S] and that plus log T. The level is log T + E_0[S] / 2, the value for normally
    distributed logits, or the lower bound if that is higher. The channel w - 1/2 keeps its relative precision
    where w is near 1/2, the channel 1 - w where w is near 1.
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
        scaled_change: Callable[[Any], Any] | None = None,
        kl_rows: Any = None,
    ) -> None:
        """Append both attentions.

        Args:
            op: Builder of a function with the attributes `num_heads` and `scale`.
            q: Queries before their temperature, [B, T', C] of `dtype`.
            keys: Centred keys, [B, T, C] of `operands`.
            change: d, as `keys`.
            tau_q: Temperature of the queries, [B] float32.
            dtype: Of the model's activations.
            operands: Dtype of the attentions, float16 or float32.
            scaled_change: Computes s d for s [B, 1, 1] float32, as `change`. Without, the change split into
                heads is kept for it until s is known.
            kl_rows: Indices of the rows that K' is the mean of, [N] int64; None for all.
        """
        self._operands = operands
        self._scaled_change = scaled_change
        scale = op.Constant(value_float=ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT))
        factor = cast(op, per_sample(op, op.Div(scale, tau_q), 3), operands, FLOAT)
        self._query = split_heads(op, op.Mul(cast(op, q, operands, dtype), factor))
        self._keys = split_heads(op, keys)
        self._change = split_heads(op, change)

        mean = _attention(op, self._query, self._keys, self._keys)
        mean_logit = self._dot(op, self._query, mean)

        tokens = op.Shape(self._keys, start=2, end=3)
        log_tokens = cast(op, op.Log(op.Cast(tokens, to=int(FLOAT))), operands, FLOAT)
        least = cast(op, mean_logit, operands, FLOAT)
        # Computed in the dtype of the operands, not rounded by a Cast, which an optimizer may remove together
        # with the one back.
        level = op.Max(least, op.Add(op.Mul(least, self._constant(op, [0.5], "half")), log_tokens))
        weight, log_ratio, change_logit = self._with_sentinel(op, tau_q, tokens, level)
        self.entropy = op.Add(op.Sub(self._wide(op, level), mean_logit), log_ratio)
        slope = op.Div(change_logit, weight)
        if kl_rows is not None:
            slope, self._query = (op.Gather(x, kl_rows, axis=2) for x in (slope, self._query))
        self._initial_slope = op.ReduceMean(slope, [1, 2, 3], keepdims=1)

    def slopes(self, op: Op, last: Any) -> tuple[Any, Any, Any]:
        """See `Rows`. The values are the change L d as it was rounded for the keys."""
        rounded = cast(op, last, self._operands, FLOAT)
        if self._operands != FLOAT:
            # L is not negative; an optimizer may remove a Cast together with the one back.
            rounded = op.Max(rounded, self._constant(op, [0.0], "zero"))
            last = self._wide(op, rounded)
        initial = op.Mul(last, self._initial_slope)
        if self._scaled_change is None:
            change = op.Mul(self._change, rounded)
        else:
            change = split_heads(op, self._scaled_change(op.Squeeze(last, [3])))
        middle = op.Mul(change, self._constant(op, [0.5], "half"))
        middle_slope, last_slope = (
            op.ReduceMean(self._product(op, self._query, mean), [1, 2, 3], keepdims=1)
            for mean in (
                _attention(op, self._query, op.Add(self._keys, step), change) for step in (middle, change)
            )
        )
        return initial, middle_slope, last_slope

    def _with_sentinel(self, op: Op, per_batch: Any, tokens: Any, level: Any) -> tuple[Any, Any, Any]:
        """The attention with a sentinel.

        Args:
            op: Builder.
            per_batch: Any tensor [B]. Shapes are made of it, so that all sites of a size share the marks.
            tokens: Number of keys, [1] int64.
            level: c, [B, h, T', 1].

        Returns:
            The weight w of the real keys, log(w / (1 - w)), and the sum of q . d over the real keys under
            the weights of all keys; [B, h, T', 1] float32 each.
        """
        outer = op.Concat(op.Shape(per_batch), attribute_int(op, "num_heads"), axis=0)
        raised = op.Mul(level, self._mark_constant(op, [1], "level"))
        query = op.Concat(self._query, raised, axis=3)
        size = op.Concat(outer, [1], op.Shape(self._keys, start=3, end=4), axis=0)
        nothing = op.Expand(self._constant(op, [0], "nothing"), size)
        marks = self._marks(op, outer, tokens, [], [1])
        keys = op.Concat(op.Concat(self._keys, nothing, axis=2), marks, axis=3)
        # The first channel is 0, so that the level, in the same channel of the query, does not count.
        zeros = [0.0] * (KEY_CHANNELS - 2)
        marks = self._marks(op, outer, tokens, [*zeros, 0.5, 0.0], [*zeros, -0.5, 1.0])
        values = op.Concat(op.Concat(self._change, nothing, axis=2), marks, axis=3)

        out = _attention(op, query, keys, values)
        # Not Slice, which is 25 layers of TensorRT, for shapes that are not computed.
        before = op.Add(op.Shape(self._keys, start=3, end=4), [KEY_CHANNELS - 2])
        _, above_half, sentinel = op.Split(out, op.Concat(before, [1, 1], axis=0), axis=3, _outputs=3)
        above_half, sentinel = self._wide(op, above_half), self._wide(op, sentinel)
        weight = op.Max(op.Add(above_half, 0.5), _MIN_WEIGHT)
        rest = op.Where(op.Greater(above_half, 0.25), sentinel, op.Sub(0.5, above_half))
        log_ratio = op.Clip(op.Log(op.Div(weight, rest)), -_LARGEST_LOG, _LARGEST_LOG)
        return weight, log_ratio, self._dot(op, query, out)

    def _dot(self, op: Op, x: Any, y: Any) -> Any:
        """Dot products of the vectors of two [B, h, T', D] tensors, [B, h, T', 1] float32."""
        return op.ReduceSum(self._product(op, x, y), [3], keepdims=1)

    def _product(self, op: Op, x: Any, y: Any) -> Any:
        """x y in float32, multiplied in the dtype of the operands: a float32 copy of each operand would take
        twice its memory. Rounding of products is as small as that of attention outputs."""
        return self._wide(op, op.Mul(x, y))

    def _wide(self, op: Op, value: Any) -> Any:
        return cast(op, value, FLOAT, self._operands)

    def _marks(self, op: Op, outer: Any, tokens: Any, real: list[float], sentinel: list[float]) -> Any:
        """[B, h, T + 1, KEY_CHANNELS]: `real` for each of the T keys, then `sentinel` for the last one.

        `outer` is B and h, [2] int64; `tokens` is T, [1] int64.
        """
        return op.Concat(
            *(
                op.Expand(
                    self._mark_constant(op, marks, "marks"), op.Concat(outer, count, [KEY_CHANNELS], axis=0)
                )
                for marks, count in ((real, tokens), (sentinel, [1]))
            ),
            axis=2,
        )

    def _mark_constant(self, op: Op, marks: list[float], name: str) -> Any:
        """`marks`, and zeros in the other channels, [1, 1, 1, KEY_CHANNELS]."""
        return self._constant(op, marks + [0.0] * (KEY_CHANNELS - len(marks)), name)

    def _constant(self, op: Op, values: list[float], name: str) -> Any:
        """A constant [1, 1, 1, n] of the dtype of the operands."""
        array = np.array(values, self._operands.numpy())
        return op.Constant(value=ir.tensor(array[None, None, None], name=name))


class StoredRows:
    """Rows from float32 products and a softmax, which store the logits of one attention at a time.

    No sentinel is needed: with m the largest logit of a row and w its weight, LSE = m - log w.
    """

    def __init__(self, op: Op, inputs: GuardInputs, dtype: ir.DataType, kl_rows: Any = None) -> None:
        """Append the pass over the plain keys.

        Args:
            op: Builder.
            inputs: Queries, keys and temperature.
            dtype: Of the model's activations.
            kl_rows: As for `AttentionRows`.
        """
        self._query, self._keys, self._change = float32_rows(op, inputs, dtype)
        logits, weights = self._weights(op, self._keys)
        highest, largest = (op.ReduceMax(rows, [3], keepdims=1) for rows in (logits, weights))
        mean_logit = _dot(op, self._query, op.MatMul(weights, self._keys))
        self.entropy = op.Sub(op.Sub(highest, op.Log(largest)), mean_logit)
        slope = _dot(op, self._query, op.MatMul(weights, self._change))
        if kl_rows is not None:
            slope, self._query = (op.Gather(x, kl_rows, axis=2) for x in (slope, self._query))
        self._initial_slope = op.ReduceMean(slope, [1, 2, 3], keepdims=1)

    def slopes(self, op: Op, last: Any) -> tuple[Any, Any, Any]:
        """See `Rows`."""
        change = op.Mul(self._change, last)
        means = [op.Mul(last, self._initial_slope)]
        for step in (op.Mul(change, 0.5), change):
            _, weights = self._weights(op, op.Add(self._keys, step))
            product = op.Mul(self._query, op.MatMul(weights, change))
            means.append(op.ReduceMean(product, [1, 2, 3], keepdims=1))
        return means[0], means[1], means[2]

    def _weights(self, op: Op, keys: Any) -> tuple[Any, Any]:
        # Not Transpose and MatMul: see decompose_metrics_attention.
        logits = op.Einsum(self._query, keys, equation="bhqd,bhkd->bhqk")
        return logits, op.Softmax(logits, axis=-1)


def _attention(op: Op, q: Any, k: Any, v: Any) -> Any:
    """`Attention` of [B, h, T, D] tensors with scaled queries.

    TensorRT multiplies queries and keys by the square root of a scale in their own type; 1 is exact.
    """
    return op.Attention(q, k, v, scale=1.0)


def _dot(op: Op, x: Any, y: Any) -> Any:
    """Dot products of the vectors of two [B, h, T, D] tensors, [B, h, T, 1]."""
    return op.ReduceSum(op.Mul(x, y), [3], keepdims=1)

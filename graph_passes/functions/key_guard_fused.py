"""`sws.KeyGuard` from fused attention alone: no T x T tensor outlives an `Attention` node.

Means over the keys are attention outputs, E_t[d] for values d. So is the log-sum-exp of a row: with one more
channel, in which queries carry -c / scale, keys and values 1, and one more key and value of zeros, the
logits of a row are S - c and 0, and the output of that channel is the share o = e^LSE / (e^LSE + e^c). Hence
LSE = c + log(o / (1 - o)), to the relative precision of the dtype as long as c lies some nats above LSE, and
the mean is the output of the other channels divided by o.

With K(t) = LSE(S0 + t Delta) - LSE(S0), the divergence at t is KL(t) = t E_t[Delta] - K(t): exact wherever it
is evaluated. It grows with t, and log(KL / t^2) is smooth, so that three evaluations find the step which the
bisection of the literal form finds. They can miss it where a few rows of extreme logits carry the
divergence and the budget binds far below the cap; docs/performance.md says how often and by how much.
"""

from typing import Any

import onnx_ir as ir

from graph_passes.errors import GraphError
from graph_passes.functions.building import Op, attribute_int, cast, per_sample
from graph_passes.functions.entropy_factor import entropy_factor
from graph_passes.parameters import SwsParameters

FLOAT = ir.DataType.FLOAT
EVALUATIONS = 3
"""Divergences evaluated over all keys, each as costly as plain attention."""
MIN_BUDGET = 1e-3
"""Smallest KL budget (nats) that float32 statistics tell from rounding."""
MAX_STEPS = 8
"""Most halvings whose last step the evaluations resolve."""
_ABOVE_LOGIT = 70.0
_ABOVE_ROW_MEAN = 8.0
_ABOVE_LOG_SUM = 20.0
_ABOVE_LOG_SUM_16_BIT = 4.0
_KEY_STRIDE = 8
_MIN_SHARE = 1e-37
_MIN_REST = 1e-7
_MIN_DIVERGENCE = 1e-9


def check_fused_guard(parameters: SwsParameters) -> None:
    """Refuse parameters for which the few evaluations are not known to find the literal form's step.

    Raises:
        GraphError: The smallest KL budget at which keys are mixed is below `MIN_BUDGET`, or the grid is finer
            than `MAX_STEPS` halvings.
    """
    budget = parameters.kl_floor + parameters.kl_slope * max(0.0, 1.0 - parameters.u_stop)
    if budget < MIN_BUDGET:
        raise GraphError(
            f"guard fused: the KL budget falls to {budget:.3g} nats, and below {MIN_BUDGET:g} rounding "
            "decides; use guard literal, or raise kl_floor or kl_slope"
        )
    if parameters.bisection_steps > MAX_STEPS:
        raise GraphError(
            f"guard fused: bisection_steps is {parameters.bisection_steps}, and the fused guard resolves "
            f"at most {MAX_STEPS}; use guard literal"
        )


def fused_guard(
    op: Op,
    parameters: SwsParameters,
    dtype: ir.DataType,
    statistics: ir.DataType,
    q: Any,
    k: Any,
    k_perm: Any,
    tau_q: Any,
    amplitude: Any,
    kappa: Any,
) -> tuple[Any, Any]:
    """The share of transported keys before its gate, and the amplitude a, [B] float32 each.

    `dtype` is that of q, k and k_perm, `statistics` that of the attention nodes.
    """
    query = _Heads(op, op.Div(cast(op, q, FLOAT, dtype), per_sample(op, tau_q, 3)), statistics)
    wide_k = cast(op, k, FLOAT, dtype)
    moved = _split_heads(op, op.Sub(cast(op, k_perm, FLOAT, dtype), wide_k))
    # A vector added to all keys changes no weight, and costs digits.
    keys = _split_heads(op, op.Sub(wide_k, op.ReduceMean(wide_k, [1], keepdims=1)))

    log_sum, mean_logit = _plain_statistics(op, query, keys)
    mix = op.Clip(op.Mul(amplitude, entropy_factor(op, op.Sub(log_sum, mean_logit))), 0.0, 1.0)

    steps = 2**parameters.bisection_steps
    unit = op.Mul(mix, parameters.key_cap / steps)
    shifted, shift = query.shifted(
        op.Add(log_sum, _ABOVE_LOG_SUM if statistics == FLOAT else _ABOVE_LOG_SUM_16_BIT)
    )
    growth = op.Sub(shift, log_sum)
    values = cast(op, _with_sentinel(op, moved), statistics, FLOAT)
    base = _with_sentinel(op, keys)
    change = op.Pad(moved, [0, 0, 1, 1], None, [2, 3])

    def divergence(step: Any) -> Any:
        share = op.Mul(unit, step)
        mixed = op.Add(base, op.Mul(per_sample(op, share, 4), change))
        rest, mean = query.attend(shifted, cast(op, mixed, statistics, FLOAT), values)
        row = op.Sub(op.Mul(per_sample(op, share, 4), mean), op.Add(rest, growth))
        return op.ReduceMean(row, [1, 2, 3], keepdims=0)

    return op.Mul(unit, _find_step(op, divergence, kappa, steps)), mix


def _find_step(op: Op, divergence: Any, kappa: Any, steps: int) -> Any:
    """The largest n of 0 .. steps - 1 with divergence(n) <= kappa, [B] float32.

    Takes log(KL / n^2) for linear in n, through the last two points, and evaluates at integers: the last
    decides between two neighbours by itself.
    """
    last = float(steps - 1)
    log_budget = op.Log(op.Max(kappa, _MIN_DIVERGENCE))
    low, high = op.Mul(kappa, 0.0), op.Add(op.Mul(kappa, 0.0), float(steps))
    step = op.Add(low, last)
    earlier = None
    for _ in range(EVALUATIONS):
        value = divergence(step)
        allowed = op.LessOrEqual(value, kappa)
        low = op.Where(allowed, op.Max(low, step), low)
        high = op.Where(allowed, high, op.Min(high, step))

        log_value = op.Log(op.Max(value, _MIN_DIVERGENCE))
        log_step = op.Log(step)
        level = op.Sub(log_value, op.Mul(log_step, 2.0))
        power: Any = 2.0
        if earlier is not None:
            run = op.Sub(step, earlier[0])
            # 0 where both points are the same one.
            slope = op.Div(op.Mul(op.Sub(level, earlier[1]), run), op.Add(op.Mul(run, run), 1e-3))
            power = op.Clip(op.Add(op.Mul(slope, step), 2.0), 1.0, 4.0)
        earlier = (step, level)
        root = op.Exp(op.Add(log_step, op.Div(op.Sub(log_budget, log_value), power)))
        root = op.Max(low, op.Min(root, op.Sub(high, 0.01)))
        step = op.Clip(op.Round(root), 1.0, last)
    return op.Floor(root)


def _plain_statistics(op: Op, query: "_Heads", keys: Any) -> tuple[Any, Any]:
    """Log-sum-exp and mean of the logits of each row under plain attention, [B, h, T, 1] float32.

    Keys are centred: the log-sum-exp lies above the mean logit, 0, and above every single one, and in float32
    its share is readable up to 78 nats above such a bound; a row that is further above is taken for one-hot.
    In 16 bit shares below 1e-4 are lost, and a first pass finds the mean under the row's own weights, at most
    log(T) below.
    """
    if query.dtype == FLOAT:
        some = op.Transpose(op.Slice(keys, [0], [2**31], [2], [_KEY_STRIDE]), perm=[0, 1, 3, 2])
        highest = op.ReduceMax(op.MatMul(query.wide, some), [3], keepdims=1)
        guess = op.Add(op.Max(highest, 0.0), _ABOVE_LOGIT)
    else:
        narrow = cast(op, keys, query.dtype, FLOAT)
        weighted_key = query.attention(query.tensor, narrow, narrow)
        guess = op.Add(query.logit(cast(op, weighted_key, FLOAT, query.dtype)), _ABOVE_ROW_MEAN)
    shifted, shift = query.shifted(guess)
    rows = cast(op, _with_sentinel(op, keys), query.dtype, FLOAT)
    rest, mean = query.attend(shifted, rows, rows)
    return op.Max(op.Add(shift, rest), mean), mean


class _Heads:
    """Queries [B, h, T, D] and the attention done with them, in `dtype`; all else is float32."""

    def __init__(self, op: Op, q: Any, dtype: ir.DataType) -> None:
        self.op = op
        self.dtype = dtype
        self.tensor = _split_heads(op, cast(op, q, dtype, FLOAT))
        self.scale = op.Constant(value_float=ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT))
        self.wide = op.Mul(cast(op, self.tensor, FLOAT, dtype), self.scale)

    def logit(self, key: Any) -> Any:
        """Logits of float32 keys that each row has for itself, [B, h, T, 1]."""
        return self.op.ReduceSum(self.op.Mul(self.wide, key), [3], keepdims=1)

    def shifted(self, shift: Any) -> tuple[Any, Any]:
        """Queries that lower all logits by `shift` [B, h, T, 1], and the shift as the dtype holds it."""
        op = self.op
        channel = cast(op, op.Div(shift, self.scale), self.dtype, FLOAT)
        held = op.Mul(cast(op, channel, FLOAT, self.dtype), self.scale)
        return op.Concat(self.tensor, op.Neg(channel), axis=3), held

    def attend(self, shifted: Any, keys: Any, values: Any) -> tuple[Any, Any]:
        """What the log-sum-exp has above the shift, and the mean of q . values, [B, h, T, 1] float32."""
        op = self.op
        out = cast(op, self.attention(shifted, keys, values), FLOAT, self.dtype)
        share = op.Max(op.Slice(out, [-1], [2**31], [3]), _MIN_SHARE)
        rest = op.Max(op.Sub(1.0, share), _MIN_REST)
        mean = op.Div(self.logit(op.Slice(out, [0], [-1], [3])), share)
        return op.Log(op.Div(share, rest)), mean

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        """Fused attention of [B, h, T, D] tensors."""
        return self.op.Attention(q, k, v, scale=ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT))


def _split_heads(op: Op, x: Any) -> Any:
    """[B, T, C] as [B, h, T, D]: of 3-D inputs, ONNX's inference gets the shape of `Attention` wrong."""
    shape = op.Concat([0, 0], attribute_int(op, "num_heads"), [-1], axis=0)
    return op.Transpose(op.Reshape(x, shape), perm=[0, 2, 1, 3])


def _with_sentinel(op: Op, x: Any) -> Any:
    """[B, h, T, D] with a channel of ones, and then a row of zeros."""
    return op.Pad(op.Pad(x, [0, 1], 1.0, [3]), [0, 1], None, [2])

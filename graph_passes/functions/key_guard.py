"""`sws.KeyGuard`: the largest mixing of keys within a KL budget, and the mixing of values."""

from typing import Any

import onnx_ir as ir

from graph_passes.errors import GraphError
from graph_passes.functions.building import (
    Op,
    cast,
    define_function,
    per_sample,
    split_heads,
)
from graph_passes.functions.entropy_factor import entropy_factor
from graph_passes.functions.key_guard_fused import branching_guard
from graph_passes.functions.key_guard_inputs import GuardInputs
from graph_passes.functions.key_guard_means import AttentionRows, MaterializedRows, Rows, means_guard
from graph_passes.guard import GuardForm, fused_guard_limit
from graph_passes.parameters import SwsParameters
from graph_passes.target import Target

FLOAT = ir.DataType.FLOAT


def build_key_guard(
    parameters: SwsParameters,
    dtype: ir.DataType,
    target: Target,
    form: GuardForm = "literal",
    overload: str = "",
    *,
    kl_only: bool = False,
) -> ir.Function:
    """`KeyGuard(q, k, k_perm, tau_q, amplitude, kappa, key_gate, value_gain) -> alpha_k, a_v`.

    k and k_perm are [B, T, C] of the model's dtype, q is [B, T', C]: all rows or some of them; everything
    else is [B] float32. Attributes: `num_heads`, `scale` (of the logits), `key_cap` and `bisection_steps`.
    Statistics are float32 in every precision. With `kl_only` it has one more input at the end, `kl_rows`
    [N] int64: indices of the rows of q that the KL divergence is the mean of.

    Args:
        parameters: Constants of the method.
        dtype: Of the model's activations.
        target: Runtime that the graph is for. With `branches` the fused guard has `If` nodes, which skip
            evaluations that cannot change its result, and its step is exact. Without, it is `means_guard`,
            whose step may be a neighbour of the exact one.
        form: `literal` materializes the logits and evaluates the mean KL divergence over heads and rows in
            each step of the bisection. `fused` finds the step from a few `Attention` nodes without them.
        overload: Name of the overload. With one, `means_guard` stores float32 logits.
        kl_only: The KL divergence is that of some of the rows, entropies are those of all.

    Raises:
        GraphError: The fused guard does not support the parameters.
    """
    limit = fused_guard_limit(parameters) if form == "fused" else None
    if limit:
        raise GraphError(limit)

    def body(op: Op, *values: Any) -> tuple[Any, Any]:
        inputs = GuardInputs(*values[: len(GuardInputs._fields)])
        kl_rows = values[-1] if kl_only else None
        if form == "literal":
            share, mix = _literal_guard(op, parameters, dtype, inputs, kl_rows)
        elif target.branches:
            share, mix = branching_guard(op, parameters, dtype, inputs, kl_rows)
        else:
            return means_guard(op, parameters, inputs, _rows(op, inputs, dtype, target, overload, kl_rows))
        return share, op.Clip(op.Mul(mix, inputs.value_gain), 0.0, 1.0)

    types = dict.fromkeys(GuardInputs._fields[:3], dtype) | dict.fromkeys(GuardInputs._fields[3:], FLOAT)
    function = define_function(
        "KeyGuard",
        body,
        types | ({"kl_rows": ir.DataType.INT64} if kl_only else {}),
        ["alpha_k", "a_v"],
        [
            ir.Attr("num_heads", ir.AttributeType.INT, None),
            ir.Attr("scale", ir.AttributeType.FLOAT, None),
            # Constants of the body; the plugin that replaces it reads them.
            ir.Attr("key_cap", ir.AttributeType.FLOAT, None),
            ir.Attr("bisection_steps", ir.AttributeType.INT, None),
        ],
    )
    function.overload = overload
    return function


def _rows(
    op: Op, inputs: GuardInputs, dtype: ir.DataType, target: Target, overload: str, kl_rows: Any
) -> Rows:
    if overload or (dtype == FLOAT and not target.float32_attention):
        return MaterializedRows(op, inputs, dtype, kl_rows, small=bool(overload))
    narrow = target.float16_attention and dtype != FLOAT
    operands = ir.DataType.FLOAT16 if narrow else FLOAT
    # The site mixes the same keys with the same difference.
    keys, change = split_heads(op, inputs.k), split_heads(op, op.Sub(inputs.k_perm, inputs.k))
    keys, change = (cast(op, x, operands, dtype) for x in (keys, change))
    return AttentionRows(op, inputs.q, keys, change, inputs.tau_q, dtype, operands, kl_rows)


def _literal_guard(
    op: Op, parameters: SwsParameters, dtype: ir.DataType, inputs: GuardInputs, kl_rows: Any
) -> tuple[Any, Any]:
    """alpha_k and the amplitude a, [B] float32 each."""
    q, k, k_perm = (cast(op, x, FLOAT, dtype) for x in inputs[:3])
    query = op.Div(split_heads(op, q), per_sample(op, inputs.tau_q, 4))
    query = op.Mul(query, op.Constant(value_float=ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT)))
    logits = op.MatMul(query, split_heads(op, k, [0, 2, 3, 1]))
    delta = op.Sub(op.MatMul(query, split_heads(op, k_perm, [0, 2, 3, 1])), logits)
    log_base = op.LogSoftmax(logits, axis=-1)

    entropy = op.Neg(op.ReduceSum(op.Mul(op.Exp(log_base), log_base), [3], keepdims=1))
    mix = op.Clip(op.Mul(inputs.amplitude, entropy_factor(op, entropy)), 0.0, 1.0)
    if kl_rows is not None:
        logits, delta, log_base = (op.Gather(x, kl_rows, axis=2) for x in (logits, delta, log_base))

    low = op.Mul(mix, 0.0)
    high = op.Mul(mix, parameters.key_cap)
    for _ in range(parameters.bisection_steps):
        middle = op.Mul(op.Add(low, high), 0.5)
        log_mixed = op.LogSoftmax(op.Add(logits, op.Mul(per_sample(op, middle, 4), delta)), axis=-1)
        gain = op.Mul(op.Exp(log_mixed), op.Sub(log_mixed, log_base))
        divergence = op.ReduceMean(op.ReduceSum(gain, [3], keepdims=0), [1, 2], keepdims=0)
        allowed = op.LessOrEqual(divergence, inputs.kappa)
        low = op.Where(allowed, middle, low)
        high = op.Where(allowed, high, middle)
    return op.Mul(low, inputs.key_gate), mix

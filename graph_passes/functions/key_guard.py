"""`sws.KeyGuard`: how far keys and values may be mixed, found under a KL budget."""

from typing import Any, Literal

import onnx_ir as ir

from graph_passes.functions.building import Op, attribute_int, cast, define_function, per_sample
from graph_passes.functions.entropy_factor import entropy_factor
from graph_passes.functions.key_guard_fused import (
    branching_guard,
    branchless_guard,
    check_fused_guard,
)
from graph_passes.parameters import SwsParameters

FLOAT = ir.DataType.FLOAT
Guard = Literal["literal", "fused"]
_INPUTS = ("tau_q", "amplitude", "kappa", "key_gate", "value_gain")


def build_key_guard(
    parameters: SwsParameters,
    dtype: ir.DataType,
    guard: Guard = "literal",
    branches: bool = False,
    stored: bool = False,
) -> ir.Function:
    """`KeyGuard(q, k, k_perm, tau_q, amplitude, kappa, key_gate, value_gain) -> alpha_k, a_v`.

    k and k_perm are [B, T, C] of the model's dtype, q likewise, or with some of the rows only; everything
    else is [B] float32. Attributes `num_heads`, `scale` (of the logits), `key_cap` and `bisection_steps`.
    Statistics are float32 in every precision.

    Args:
        parameters: Constants of the method.
        dtype: Of the model's activations.
        guard: `literal` stores the logits and evaluates the mean KL over heads and rows in every step of the
            bisection. `fused` finds the step from a few `Attention` nodes and stores none.
        branches: Let `fused` have `If` nodes, which skip evaluations that decide nothing and prove the step.
            Without them it is straight-line, and for extreme logits the step may be another one, see
            docs/performance.md.
        stored: Let `fused` store the logits of one attention at a time, without branches: for a runtime that
            does so anyway.

    Raises:
        GraphError: `fused`, and the parameters are outside the range in which it is exact.
    """
    if guard == "fused":
        check_fused_guard(parameters)

    def body(op: Op, q: Any, k: Any, k_perm: Any, *per_batch: Any) -> tuple[Any, Any]:
        tau_q, amplitude, kappa, key_gate, value_gain = per_batch
        shared = (op, parameters, dtype, q, k, k_perm, tau_q, amplitude, kappa, key_gate)
        if guard == "literal":
            share, mix = _literal_guard(*shared)
        elif branches and not stored:
            share, mix = branching_guard(*shared)
        else:
            share, mix = branchless_guard(*shared, stored=stored)
        return share, op.Clip(op.Mul(mix, value_gain), 0.0, 1.0)

    return define_function(
        "KeyGuard",
        body,
        {"q": dtype, "k": dtype, "k_perm": dtype} | dict.fromkeys(_INPUTS, FLOAT),
        ["alpha_k", "a_v"],
        [
            ir.Attr("num_heads", ir.AttributeType.INT, None),
            ir.Attr("scale", ir.AttributeType.FLOAT, None),
            # Built into the body; a plugin that takes its place reads them.
            ir.Attr("key_cap", ir.AttributeType.FLOAT, None),
            ir.Attr("bisection_steps", ir.AttributeType.INT, None),
        ],
    )


def _literal_guard(
    op: Op,
    parameters: SwsParameters,
    dtype: ir.DataType,
    q: Any,
    k: Any,
    k_perm: Any,
    tau_q: Any,
    amplitude: Any,
    kappa: Any,
    key_gate: Any,
) -> tuple[Any, Any]:
    """The share of transported keys and the amplitude a, [B] float32 each."""
    query = op.Div(_heads(op, q, dtype, [0, 2, 1, 3]), per_sample(op, tau_q, 4))
    query = op.Mul(query, op.Constant(value_float=ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT)))
    logits = op.MatMul(query, _heads(op, k, dtype, [0, 2, 3, 1]))
    delta = op.Sub(op.MatMul(query, _heads(op, k_perm, dtype, [0, 2, 3, 1])), logits)
    log_base = op.LogSoftmax(logits, axis=-1)

    entropy = op.Neg(op.ReduceSum(op.Mul(op.Exp(log_base), log_base), [3], keepdims=1))
    mix = op.Clip(op.Mul(amplitude, entropy_factor(op, entropy)), 0.0, 1.0)

    low = op.Mul(mix, 0.0)
    high = op.Mul(mix, parameters.key_cap)
    for _ in range(parameters.bisection_steps):
        middle = op.Mul(op.Add(low, high), 0.5)
        log_mixed = op.LogSoftmax(op.Add(logits, op.Mul(per_sample(op, middle, 4), delta)), axis=-1)
        gain = op.Mul(op.Exp(log_mixed), op.Sub(log_mixed, log_base))
        divergence = op.ReduceMean(op.ReduceSum(gain, [3], keepdims=0), [1, 2], keepdims=0)
        allowed = op.LessOrEqual(divergence, kappa)
        low = op.Where(allowed, middle, low)
        high = op.Where(allowed, high, middle)
    return op.Mul(low, key_gate), mix


def _heads(op: Op, x: Any, dtype: ir.DataType, perm: list[int]) -> Any:
    """[B, T, C] as float32 [B, T, heads, D], permuted."""
    shape = op.Concat([0, 0], attribute_int(op, "num_heads"), [-1], axis=0)
    return op.Transpose(op.Reshape(cast(op, x, FLOAT, dtype), shape), perm=perm)

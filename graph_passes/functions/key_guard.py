"""`sws.KeyGuard`: how far keys and values may be mixed, found under a KL budget."""

from typing import Any

import onnx_ir as ir

from graph_passes.functions.building import Op, attribute_int, cast, define_function, per_sample
from graph_passes.parameters import SwsParameters

FLOAT = ir.DataType.FLOAT
_MIN_ENTROPY_RANGE = 1e-6


def build_key_guard(parameters: SwsParameters, dtype: ir.DataType) -> ir.Function:
    """`KeyGuard(q, k, k_perm, tau_q, amplitude, kappa, key_gate, value_gain) -> alpha_k, a_v`.

    q, k and k_perm are [B, T, C] of the model's dtype; everything else is [B] float32.
    Attributes `num_heads` and `scale` (of the logits). The literal form: logits are stored, and every
    bisection step evaluates the mean KL over heads and rows. Statistics are float32 in every precision.
    """

    def body(
        op: Op,
        q: Any,
        k: Any,
        k_perm: Any,
        tau_q: Any,
        amplitude: Any,
        kappa: Any,
        key_gate: Any,
        value_gain: Any,
    ) -> tuple[Any, Any]:
        query = op.Div(_heads(op, q, dtype, [0, 2, 1, 3]), per_sample(op, tau_q, 4))
        query = op.Mul(
            query, op.Constant(value_float=ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT))
        )
        logits = op.MatMul(query, _heads(op, k, dtype, [0, 2, 3, 1]))
        delta = op.Sub(op.MatMul(query, _heads(op, k_perm, dtype, [0, 2, 3, 1])), logits)
        log_base = op.LogSoftmax(logits, axis=-1)

        spread = _entropy_factor(op, log_base)
        mix = op.Clip(op.Mul(amplitude, spread), 0.0, 1.0)

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
        alpha_k = op.Mul(low, key_gate)
        a_v = op.Clip(op.Mul(mix, value_gain), 0.0, 1.0)
        return alpha_k, a_v

    return define_function(
        "KeyGuard",
        body,
        {
            "q": dtype,
            "k": dtype,
            "k_perm": dtype,
            "tau_q": FLOAT,
            "amplitude": FLOAT,
            "kappa": FLOAT,
            "key_gate": FLOAT,
            "value_gain": FLOAT,
        },
        ["alpha_k", "a_v"],
        [ir.Attr("num_heads", ir.AttributeType.INT, None), ir.Attr("scale", ir.AttributeType.FLOAT, None)],
    )


def _heads(op: Op, x: Any, dtype: ir.DataType, perm: list[int]) -> Any:
    """[B, T, C] as float32 [B, T, heads, D], permuted."""
    shape = op.Concat([0, 0], attribute_int(op, "num_heads"), [-1], axis=0)
    return op.Transpose(op.Reshape(cast(op, x, FLOAT, dtype), shape), perm=perm)


def _entropy_factor(op: Op, log_probabilities: Any) -> Any:
    """Mean row entropy of a sample between its smallest (0) and its largest (1), over heads and rows, [B]."""
    terms = op.Mul(op.Exp(log_probabilities), log_probabilities)
    entropy = op.Neg(op.ReduceSum(terms, [3], keepdims=0))
    mean = op.ReduceMean(entropy, [1, 2], keepdims=0)
    smallest = op.ReduceMin(entropy, [1, 2], keepdims=0)
    largest = op.ReduceMax(entropy, [1, 2], keepdims=0)
    width = op.Max(op.Sub(largest, smallest), _MIN_ENTROPY_RANGE)
    return op.Clip(op.Div(op.Sub(mean, smallest), width), 0.0, 1.0)

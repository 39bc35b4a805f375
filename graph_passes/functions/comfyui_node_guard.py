"""`sws.ComfyUINodeKeys` and `sws.ComfyUINodeGuard`: the mixing of text tokens of the published ComfyUI node.

The attention of its guard has no heads and is between the inputs of the projections; its scalars are computed
over the whole batch. Everything is float32 in every precision.
"""

import math
from typing import Any

import onnx_ir as ir

from graph_passes.functions.building import Op, cast, define_function, per_sample
from graph_passes.functions.entropy_factor import entropy_factor
from graph_passes.parameters import SwsParameters

FLOAT = ir.DataType.FLOAT
_LOG_FLOOR = math.log(1e-8)


def build_comfyui_node_keys(dtype: ir.DataType) -> ir.Function:
    """`ComfyUINodeKeys(text [B, n, X], basis [X, C] float32) -> keys [B, n, C]` float32, for text of `dtype`.

    The basis or its transpose is orthonormal. If the text is narrower than the hidden states, the node
    projects the queries to its width by the transpose; the products of queries and keys are the same.
    """

    def body(op: Op, text: Any, basis: Any) -> Any:
        return op.MatMul(cast(op, text, FLOAT, dtype), basis)

    return define_function("ComfyUINodeKeys", body, {"text": dtype, "basis": FLOAT}, ["keys"])


def build_comfyui_node_guard(
    parameters: SwsParameters, dtype: ir.DataType, site_metrics: bool = False
) -> ir.Function:
    """`ComfyUINodeGuard(hidden, keys, previous, fresh, tau, amplitude, kappa, key_gate, value_gain)`.

    Outputs `transport, alpha_k, a_v`. hidden is [B, T, C] of `dtype`, before its projection; keys [B, n, C],
    previous, fresh and transport [1, n, n]; everything else [1]; all but hidden float32. Attribute: `scale`
    of the logits. The logits of keys k + alpha (P k - k) are S + alpha (S Pᵀ - S): only S is a product over
    channels.

    Args:
        parameters: Constants of the method.
        dtype: Of the model's activations.
        site_metrics: Give a fourth output [1, 1, 6] float32: `SITE_METRICS` of debug_outputs.
    """

    def body(
        op: Op,
        hidden: Any,
        keys: Any,
        previous: Any,
        fresh: Any,
        tau: Any,
        amplitude: Any,
        kappa: Any,
        key_gate: Any,
        value_gain: Any,
    ) -> tuple[Any, ...]:
        scale = op.Constant(value_float=ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT))
        keys = op.Mul(keys, op.Div(scale, per_sample(op, tau, 3)))
        logits = op.MatMul(cast(op, hidden, FLOAT, dtype), op.Transpose(keys, perm=[0, 2, 1]))
        log_plain = op.LogSoftmax(logits, axis=-1)
        entropy = op.Neg(op.ReduceSum(op.Mul(op.Exp(log_plain), log_plain), [2], keepdims=0))
        rows = _all_rows(op, entropy)
        mix = op.Clip(op.Mul(amplitude, entropy_factor(op, rows, [1])), 0.0, 1.0)

        transport = op.ComfyUINodeMomentum(previous, fresh, mix, _domain="sws")
        moved = op.MatMul(logits, op.Transpose(transport, perm=[0, 2, 1]))
        delta = op.Sub(moved, logits)
        floored_plain = op.Max(log_plain, _LOG_FLOOR)

        def divergence(alpha: Any) -> Any:
            mixed = op.Add(logits, op.Mul(per_sample(op, alpha, 3), delta))
            log_mixed = op.LogSoftmax(mixed, axis=-1)
            ratio = op.Sub(op.Max(log_mixed, _LOG_FLOOR), floored_plain)
            row = op.ReduceSum(op.Mul(op.Exp(log_mixed), ratio), [2], keepdims=0)
            return op.ReduceMean(_all_rows(op, row), [1], keepdims=0)

        low, high = op.Mul(mix, 0.0), op.Mul(mix, parameters.key_cap)
        for _ in range(parameters.bisection_steps):
            middle = op.Mul(op.Add(low, high), 0.5)
            allowed = op.LessOrEqual(divergence(middle), kappa)
            low = op.Where(allowed, middle, low)
            high = op.Where(allowed, high, middle)
        alpha_k, a_v = op.Mul(low, key_gate), op.Clip(op.Mul(mix, value_gain), 0.0, 1.0)
        if not site_metrics:
            return transport, alpha_k, a_v
        reductions = (op.ReduceMean, op.ReduceMin, op.ReduceMax)
        metrics = [
            alpha_k,
            a_v,
            *(reduce(rows, [1], keepdims=0) for reduce in reductions),
            divergence(alpha_k),
        ]
        return transport, alpha_k, a_v, op.Reshape(op.Concat(*metrics, axis=0), [1, 1, -1])

    scalars = ("tau", "amplitude", "kappa", "key_gate", "value_gain")
    return define_function(
        "ComfyUINodeGuard",
        body,
        {"hidden": dtype} | dict.fromkeys(("keys", "previous", "fresh", *scalars), FLOAT),
        ["transport", "alpha_k", "a_v", *(["site_metrics"] if site_metrics else [])],
        [ir.Attr("scale", ir.AttributeType.FLOAT, None)],
    )


def _all_rows(op: Op, x: Any) -> Any:
    """[B, T] as [1, B * T]."""
    return op.Reshape(x, [1, -1])

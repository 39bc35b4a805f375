"""The inputs of `sws.KeyGuard`."""

from typing import Any, NamedTuple

import onnx_ir as ir

from graph_passes.functions.building import Op, cast, per_sample, split_heads


class GuardInputs(NamedTuple):
    """The inputs of `sws.KeyGuard`, in order.

    Attributes:
        q: Queries before their temperature, [B, T', C] of the model's dtype: all rows, or some of them.
        k: Keys [B, T, C] of the model's dtype.
        k_perm: Transported keys, as `k`.
        tau_q: Temperature of the queries, [B] float32; all that follow likewise.
        amplitude: intensity w(u): the amplitude a before it is multiplied by the entropy factor.
        kappa: KL budget in nats.
        key_gate: 0 if keys are not mixed, else 1.
        value_gain: a_v at an amplitude of 1.
    """

    q: Any
    k: Any
    k_perm: Any
    tau_q: Any
    amplitude: Any
    kappa: Any
    key_gate: Any
    value_gain: Any


def float32_rows(op: Op, inputs: GuardInputs, dtype: ir.DataType) -> tuple[Any, Any, Any]:
    """Queries, keys and the change d = k_perm - k of the keys in float32, split into heads [B, h, T, D].

    The scale of the logits and the temperature are in the queries. The keys are centred: a vector added to
    all keys does not change the weights, and costs precision. The mean logit of centred keys is 0.

    Args:
        op: Builder of a function with the attribute `scale`.
        inputs: Queries, keys and temperature.
        dtype: Of the model's activations.
    """
    float32_k = cast(op, inputs.k, ir.DataType.FLOAT, dtype)
    scale = op.Constant(value_float=ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT))
    factor = op.Div(scale, per_sample(op, inputs.tau_q, 3))
    query = split_heads(op, op.Mul(cast(op, inputs.q, ir.DataType.FLOAT, dtype), factor))
    keys = split_heads(op, op.Sub(float32_k, op.ReduceMean(float32_k, [1], keepdims=1)))
    change = split_heads(op, op.Sub(cast(op, inputs.k_perm, ir.DataType.FLOAT, dtype), float32_k))
    return query, keys, change

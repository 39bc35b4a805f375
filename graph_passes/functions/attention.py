"""`sws.Attention`: one whole self-attention site with mixed keys and values."""

from typing import Any

import onnx_ir as ir

from graph_passes.functions.building import Op, cast, define_function, per_sample

FLOAT = ir.DataType.FLOAT


def build_attention(dtype: ir.DataType) -> ir.Function:
    """`Attention(q, k, v [B, T, C], transport, tau_q, amplitude, kappa, key_gate, value_gain) -> y`.

    q, k, v and y are [B, T, C] of the model's dtype. Attributes `num_heads` and `scale` (of the logits).
    Mixing is written `k + alpha * (k_perm - k)`, so that alpha = 0 gives k itself, bit for bit.
    """

    def body(
        op: Op,
        q: Any,
        k: Any,
        v: Any,
        transport: Any,
        tau_q: Any,
        amplitude: Any,
        kappa: Any,
        key_gate: Any,
        value_gain: Any,
    ) -> Any:
        num_heads = ir.RefAttr("num_heads", "num_heads", ir.AttributeType.INT)
        scale = ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT)
        moved = op.BandedTransport(transport, op.Concat(k, v, axis=2), _domain="sws")
        k_perm, v_perm = op.Split(moved, num_outputs=2, axis=2, _outputs=2)
        alpha_k, a_v = op.KeyGuard(
            q,
            k,
            k_perm,
            tau_q,
            amplitude,
            kappa,
            key_gate,
            value_gain,
            num_heads=num_heads,
            scale=scale,
            _domain="sws",
            _outputs=2,
        )
        q = op.Div(q, cast(op, per_sample(op, tau_q, 3), dtype, FLOAT))
        return op.Attention(
            q,
            _mix(op, k, k_perm, alpha_k, dtype),
            _mix(op, v, v_perm, a_v, dtype),
            q_num_heads=ir.RefAttr("q_num_heads", "num_heads", ir.AttributeType.INT),
            kv_num_heads=ir.RefAttr("kv_num_heads", "num_heads", ir.AttributeType.INT),
            scale=scale,
        )

    return define_function(
        "Attention",
        body,
        {
            "q": dtype,
            "k": dtype,
            "v": dtype,
            "transport": FLOAT,
            "tau_q": FLOAT,
            "amplitude": FLOAT,
            "kappa": FLOAT,
            "key_gate": FLOAT,
            "value_gain": FLOAT,
        },
        ["y"],
        [ir.Attr("num_heads", ir.AttributeType.INT, None), ir.Attr("scale", ir.AttributeType.FLOAT, None)],
    )


def _mix(op: Op, x: Any, moved: Any, amount: Any, dtype: ir.DataType) -> Any:
    share = cast(op, per_sample(op, amount, 3), dtype, FLOAT)
    return op.Add(x, op.Mul(share, op.Sub(moved, x)))

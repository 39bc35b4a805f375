"""`sws.ComfyUINodeAttention`: one cross-attention site with the computation of the published ComfyUI node."""

from typing import Any

import onnx_ir as ir

from graph_passes.functions.building import Op, cast, define_function, per_sample

FLOAT = ir.DataType.FLOAT
_SCALARS = ("tau", "amplitude", "kappa", "key_gate", "value_gain")


def build_comfyui_node_attention(dtype: ir.DataType, site_metrics: bool = False) -> ir.Function:
    """`ComfyUINodeAttention(q, k, v, hidden, keys, previous, fresh, tau, ...) -> y, transport`.

    q and y are [B, T, C], k and v [B, n, C] of the model's dtype, projected without a bias. `hidden`, `keys`
    and all inputs after them are those of `ComfyUINodeGuard`. Attributes: `num_heads`, `scale` (of the
    logits) and `guard_scale` (of the logits of the guard).

    The node mixes text embeddings before their projection. Mixing acts on the tokens and the projection on
    the channels, so both orders give the same; after the projection there are fewer channels to mix.

    Args:
        dtype: Of the model's activations.
        site_metrics: Give a third output [B, 1, 6] float32: `SITE_METRICS` of debug_outputs, the same for all
            samples.
    """

    def body(op: Op, q: Any, k: Any, v: Any, hidden: Any, *others: Any) -> tuple[Any, ...]:
        tau = others[3]
        transport, alpha_k, a_v, *metrics = op.ComfyUINodeGuard(
            hidden,
            *others,
            scale=ir.RefAttr("scale", "guard_scale", ir.AttributeType.FLOAT),
            _domain="sws",
            _outputs=4 if site_metrics else 3,
        )
        moving = cast(op, transport, dtype, FLOAT)
        keys = _mix(op, k, moving, alpha_k, dtype)
        y = op.Attention(
            q,
            # The node divides queries and keys by sqrt(tau) each; there are fewer keys.
            op.Div(keys, cast(op, per_sample(op, tau, 3), dtype, FLOAT)),
            _mix(op, v, moving, a_v, dtype),
            q_num_heads=ir.RefAttr("q_num_heads", "num_heads", ir.AttributeType.INT),
            kv_num_heads=ir.RefAttr("kv_num_heads", "num_heads", ir.AttributeType.INT),
            scale=ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT),
        )
        batch = [op.Concat(op.Shape(hidden, start=0, end=1), [1, 1], axis=0)] if site_metrics else []
        return y, transport, *(op.Expand(each, shape) for each, shape in zip(metrics, batch, strict=True))

    return define_function(
        "ComfyUINodeAttention",
        body,
        dict.fromkeys(("q", "k", "v", "hidden"), dtype)
        | dict.fromkeys(("keys", "previous", "fresh", *_SCALARS), FLOAT),
        ["y", "transport", *(["site_metrics"] if site_metrics else [])],
        [
            ir.Attr("num_heads", ir.AttributeType.INT, None),
            ir.Attr("scale", ir.AttributeType.FLOAT, None),
            ir.Attr("guard_scale", ir.AttributeType.FLOAT, None),
        ],
    )


def _mix(op: Op, x: Any, transport: Any, amount: Any, dtype: ir.DataType) -> Any:
    """x + amount (P x - x), with P on the tokens of x [B, n, C]; amount 0 gives exactly x."""
    share = cast(op, per_sample(op, amount, 3), dtype, FLOAT)
    return op.Add(x, op.Mul(share, op.Sub(op.MatMul(transport, x), x)))

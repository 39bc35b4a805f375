"""`sws.ComfyUINodeAttention`: one whole cross-attention site as the published node leaves it."""

from typing import Any

import onnx_ir as ir

from graph_passes.functions.building import Op, cast, define_function, per_sample

FLOAT = ir.DataType.FLOAT
_SCALARS = ("tau", "amplitude", "kappa", "key_gate", "value_gain")


def build_comfyui_node_attention(dtype: ir.DataType, figures: bool = False) -> ir.Function:
    """`ComfyUINodeAttention(q, k, v, hidden, keys, previous, fresh, tau, ...) -> y, transport`.

    q is [B, T, D h], k and v [B, n, D h], projected without a bias; y is as q. `hidden`,
    `keys` and all inputs after them are those of `ComfyUINodeGuard`. Attributes
    `num_heads`, `scale` (of the logits) and `guard_scale` (of the guard's logits).

    The node mixes text embeddings before they are projected. Mixing works on the tokens and projections on
    the channels, so that either may come first, and after them there is less to mix.

    Args:
        dtype: Of the model's activations.
        figures: Give a third output [B, 1, 6] float32: `SITE_METRICS` of debug_outputs, the same for all
            samples.
    """

    def body(op: Op, q: Any, k: Any, v: Any, hidden: Any, *others: Any) -> tuple[Any, ...]:
        tau = others[3]
        transport, alpha_k, a_v, *told = op.ComfyUINodeGuard(
            hidden,
            *others,
            scale=ir.RefAttr("scale", "guard_scale", ir.AttributeType.FLOAT),
            _domain="sws",
            _outputs=4 if figures else 3,
        )
        moving = cast(op, transport, dtype, FLOAT)
        keys = _mix(op, k, moving, alpha_k, dtype)
        y = op.Attention(
            q,
            # Queries and keys by sqrt(tau) each; keys are fewer.
            op.Div(keys, cast(op, per_sample(op, tau, 3), dtype, FLOAT)),
            _mix(op, v, moving, a_v, dtype),
            q_num_heads=ir.RefAttr("q_num_heads", "num_heads", ir.AttributeType.INT),
            kv_num_heads=ir.RefAttr("kv_num_heads", "num_heads", ir.AttributeType.INT),
            scale=ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT),
        )
        batch = [op.Concat(op.Shape(hidden, start=0, end=1), [1, 1], axis=0)] if figures else []
        return y, transport, *(op.Expand(each, shape) for each, shape in zip(told, batch, strict=True))

    return define_function(
        "ComfyUINodeAttention",
        body,
        dict.fromkeys(("q", "k", "v", "hidden"), dtype)
        | dict.fromkeys(("keys", "previous", "fresh", *_SCALARS), FLOAT),
        ["y", "transport", *(["figures"] if figures else [])],
        [
            ir.Attr("num_heads", ir.AttributeType.INT, None),
            ir.Attr("scale", ir.AttributeType.FLOAT, None),
            ir.Attr("guard_scale", ir.AttributeType.FLOAT, None),
        ],
    )


def _mix(op: Op, x: Any, transport: Any, amount: Any, dtype: ir.DataType) -> Any:
    """x + amount (P x - x) over the tokens of x [B, n, D h]: amount 0 gives x itself, bit for bit."""
    share = cast(op, per_sample(op, amount, 3), dtype, FLOAT)
    return op.Add(x, op.Mul(share, op.Sub(op.MatMul(transport, x), x)))

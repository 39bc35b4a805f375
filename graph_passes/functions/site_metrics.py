"""`sws.SiteMetrics`: entropies of the attention of a site, and the KL divergence at its key mixing.

Means over the keys are attention outputs, so no logits are materialized outside of `Attention` nodes. The
log-sum-exp (LSE) of a row is read from an attention with one more key of zeros, and one more channel, which
is -c / scale in the queries and 1 in the other keys. Their logits are then S - c, that of the added key is
0, and with the weight o = e^LSE / (e^LSE + e^c) of the other keys, LSE = c + log(o / (1 - o)). The mean
logit under the weights of the row is at most log(T) below the LSE; with a c near it, the LSE has the
precision of float32.
"""

import math
from typing import Any

import onnx_ir as ir

from graph_passes.functions.building import Op, cast, define_function, per_sample, split_heads

FLOAT = ir.DataType.FLOAT
_ABOVE_ROW_MEAN = 5.0
"""About the middle of [0, log(T)] for the grids of a UNet."""
_LEAST = math.ulp(1.0)


def build_site_metrics(dtype: ir.DataType) -> ir.Function:
    """`SiteMetrics(q, k, k_perm [B, T, C], tau_q, alpha_k [B]) -> metrics`, [B, 4] float32.

    The metrics are mean, lowest and highest entropy of the rows of plain attention, and the KL divergence
    from it at `alpha_k`, mean over heads and rows; all in nats. Attributes: `num_heads` and `scale`.

    Args:
        dtype: Of q, k and k_perm; the metrics are computed in float32 from all query rows.
    """

    def body(op: Op, q: Any, k: Any, k_perm: Any, tau_q: Any, alpha_k: Any) -> Any:
        rows = _Rows(op, op.Div(cast(op, q, FLOAT, dtype), per_sample(op, tau_q, 3)))
        wide_k = cast(op, k, FLOAT, dtype)
        change = split_heads(op, op.Sub(cast(op, k_perm, FLOAT, dtype), wide_k))
        # A vector added to all keys does not change the weights, and costs precision.
        keys = split_heads(op, op.Sub(wide_k, op.ReduceMean(wide_k, [1], keepdims=1)))
        share = per_sample(op, alpha_k, 4)
        mixed = op.Add(keys, op.Mul(share, change))

        mean_logit, log_sum, _ = rows.statistics(keys, keys)
        _, mixed_log_sum, mean_change = rows.statistics(mixed, change)
        entropy = op.Max(op.Sub(log_sum, mean_logit), 0.0)
        divergence = op.Sub(op.Mul(share, mean_change), op.Sub(mixed_log_sum, log_sum))

        axes = [1, 2, 3]
        metrics = [
            op.ReduceMean(entropy, axes, keepdims=0),
            op.ReduceMin(entropy, axes, keepdims=0),
            op.ReduceMax(entropy, axes, keepdims=0),
            op.Max(op.ReduceMean(divergence, axes, keepdims=0), 0.0),
        ]
        return op.Concat(*(op.Unsqueeze(metric, [1]) for metric in metrics), axis=1)

    return define_function(
        "SiteMetrics",
        body,
        {"q": dtype, "k": dtype, "k_perm": dtype, "tau_q": FLOAT, "alpha_k": FLOAT},
        ["metrics"],
        [ir.Attr("num_heads", ir.AttributeType.INT, None), ir.Attr("scale", ir.AttributeType.FLOAT, None)],
    )


class _Rows:
    """Queries as [B, h, T, D], and statistics of their attention rows; all float32."""

    def __init__(self, op: Op, q: Any) -> None:
        self.op = op
        self.queries = split_heads(op, q)
        self.scale = op.Constant(value_float=ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT))

    def statistics(self, keys: Any, values: Any) -> tuple[Any, Any, Any]:
        """Mean logit, log-sum-exp of the logits, and mean of q . values, [B, h, T, 1] each."""
        op = self.op
        mean_logit = self._logit(self._attention(self.queries, keys, keys))
        level = op.Add(mean_logit, _ABOVE_ROW_MEAN)
        lowered = op.Concat(self.queries, op.Neg(op.Div(level, self.scale)), axis=3)
        out = self._attention(lowered, _with_sentinel(op, keys), _with_sentinel(op, values))
        share = op.Max(op.Slice(out, [-1], [2**31], [3]), _LEAST)
        rest = op.Max(op.Sub(1.0, share), _LEAST)
        mean = op.Div(self._logit(op.Slice(out, [0], [-1], [3])), share)
        return mean_logit, op.Add(level, op.Log(op.Div(share, rest))), mean

    def _logit(self, key: Any) -> Any:
        """The logits of each row for one key per row, [B, h, T, 1]."""
        return self.op.Mul(self.op.ReduceSum(self.op.Mul(self.queries, key), [3], keepdims=1), self.scale)

    def _attention(self, q: Any, k: Any, v: Any) -> Any:
        return self.op.Attention(q, k, v, scale=ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT))


def _with_sentinel(op: Op, x: Any) -> Any:
    """[B, h, T, D] with a channel of ones appended, and then a row of zeros."""
    return op.Pad(op.Pad(x, [0, 1], 1.0, [3]), [0, 1], None, [2])

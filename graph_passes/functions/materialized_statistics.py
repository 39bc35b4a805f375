"""Log-sum-exps, means and KL divergences of attention rows from materialized logits.

For a runtime without float32 `Attention`, which would materialize the logits anyway, of one attention at a
time. No sentinel key is needed: with m the largest logit of a row and w its weight, LSE = m - log w.
"""

from typing import Any

import onnx_ir as ir

from graph_passes.functions.building import Op, cast, per_sample, split_heads
from graph_passes.functions.key_guard_inputs import GuardInputs

FLOAT = ir.DataType.FLOAT


class MaterializedStatistics:
    """The query rows of one site under its keys k + t d, with d = k_perm - k.

    Attributes:
        entropy: Of the plain rows in nats, less log T, [B, h, T', 1].
    """

    def __init__(self, op: Op, inputs: GuardInputs, dtype: ir.DataType) -> None:
        """Append the pass over the plain keys.

        Args:
            op: Builder.
            inputs: Queries, keys and temperature.
            dtype: Of the model's activations.
        """
        wide_k = cast(op, inputs.k, FLOAT, dtype)
        scale = op.Constant(value_float=ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT))
        factor = op.Div(scale, per_sample(op, inputs.tau_q, 3))
        self._query = split_heads(op, op.Mul(cast(op, inputs.q, FLOAT, dtype), factor))
        # A vector added to all keys does not change the weights, and costs precision.
        self._keys = split_heads(op, op.Sub(wide_k, op.ReduceMean(wide_k, [1], keepdims=1)))
        self._change = split_heads(op, op.Sub(cast(op, inputs.k_perm, FLOAT, dtype), wide_k))
        self._tokens = op.Cast(op.Shape(self._keys, start=2, end=3), to=int(FLOAT))
        self._log_mean, mean = self._read(op, self._keys, self._keys)
        self.entropy = op.Sub(self._log_mean, mean)

    def divergence(self, op: Op, share: Any) -> Any:
        """The mean KL divergence at t = `share` [B]; [B] in nats."""
        spread = per_sample(op, share, 4)
        log_mean, change = self._read(op, op.Add(self._keys, op.Mul(spread, self._change)), self._change)
        growth = op.Sub(log_mean, self._log_mean)
        return op.ReduceMean(op.Sub(op.Mul(spread, change), growth), [1, 2, 3], keepdims=0)

    def _read(self, op: Op, keys: Any, values: Any) -> tuple[Any, Any]:
        """LSE - log T of each row over `keys`, and the mean of q . values, [B, h, T', 1] each."""
        # Not Transpose and MatMul: see decompose_guard_attention.
        logits = op.Einsum(self._query, keys, equation="bhqd,bhkd->bhqk")
        weights = op.Softmax(logits, axis=-1)
        highest, largest = (op.ReduceMax(rows, [3], keepdims=1) for rows in (logits, weights))
        log_mean = op.Sub(highest, op.Log(op.Mul(largest, self._tokens)))
        mean = op.MatMul(weights, values)
        return log_mean, op.ReduceSum(op.Mul(self._query, mean), [3], keepdims=1)

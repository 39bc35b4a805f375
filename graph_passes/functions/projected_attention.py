"""`sws.ProjectedAttention`: one attention site whose keys and values are mixed before they are projected."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.functions.attention import lattice_rows, sampled_rows
from graph_passes.functions.banded_transport import Tiles
from graph_passes.functions.building import (
    Op,
    after,
    cast,
    define_function,
    join_heads,
    logit_factor,
    per_sample,
    split_heads,
)
from graph_passes.functions.key_guard_inputs import GuardInputs
from graph_passes.functions.key_guard_means import AttentionRows, means_guard
from graph_passes.guard import ROW_STRIDES, GuardOptions
from graph_passes.parameters import STATE_RADIUS, SwsParameters, diamond_offsets

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def build_projected_attention(parameters: SwsParameters, guard: GuardOptions) -> ir.Function:
    """`ProjectedAttention(q, x [B, T, C], key_weight, value_weight [C, C], transport, ...) -> y`, float16.

    Other inputs, the output and the attributes are those of `sws.Attention`. Keys and values are x W, without
    a bias. A transport mixes tokens and a projection mixes channels, so

        P (x W) = (P x) W,    P (x W) - x W = (P x - x) W:

    one tensor is transported instead of two, and the change of the keys is not a difference of rounded keys.
    The transport less the identity gives P x - x in one product.
    Mixed keys are the sum x W + share (P x - x) W, since the guard has both products; mixed values are the
    projection of x + share (P x - x). With share 0 both are exactly those of x.

    On a GPU this also orders the work. An engine computes a tensor as early as it can, and keeps it. Here the
    guard depends on the transport, and mixed keys and values depend on the guard. Queries are made to depend
    on the transport for this alone, see `after`.

    Args:
        parameters: Constants of the method.
        guard: How the key guard is computed.
    """

    def body(
        op: Op, q: Any, x: Any, key_weight: Any, value_weight: Any, transport: Any, *per_batch: Any
    ) -> Any:
        tau_q = per_batch[0]
        # The rank of x; TensorRT's parser raises it in each product otherwise.
        key_weight, value_weight = (op.Unsqueeze(weight, [0]) for weight in (key_weight, value_weight))
        identity = op.Constant(value=ir.tensor(_identity(), name="identity"))
        change = Tiles(op, op.Sub(transport, identity), HALF).transported(x)
        # Queries, and with them all attentions, wait for the transport.
        q = after(op, q, op.ReduceMax(change, [1], keepdims=1), HALF)
        rows, kl_rows = q, None
        if guard.rows != 1:
            size, strides = op.Shape(transport, start=2, end=4), ROW_STRIDES[guard.rows]
            if guard.kl_only:
                kl_rows = lattice_rows(op, size, strides)
            else:
                rows = sampled_rows(op, q, size, strides, HALF)

        keys, key_change = (split_heads(op, op.MatMul(tokens, key_weight)) for tokens in (x, change))
        statistics = AttentionRows(op, rows, keys, key_change, tau_q, HALF, HALF, kl_rows)
        inputs = GuardInputs(rows, None, None, *per_batch)
        alpha_k, a_v = means_guard(op, parameters, inputs, statistics)

        def mixed(x: Any, change: Any, share: Any, rank: int) -> Any:
            return op.Add(x, op.Mul(cast(op, per_sample(op, share, rank), HALF, FLOAT), change))

        # Heads are split here, as for the guard, so that an engine keeps the queries in one layout. The scale
        # is in the queries for the same reason.
        operands = [
            op.Mul(split_heads(op, q), cast(op, logit_factor(op, tau_q), HALF, FLOAT)),
            mixed(keys, key_change, alpha_k, 4),
            # Mixed values wait for the guard.
            split_heads(op, op.MatMul(mixed(x, change, after(op, a_v, alpha_k), 3), value_weight)),
        ]
        return join_heads(op, op.Attention(*operands, scale=1.0))

    inputs = dict.fromkeys(("q", "x", "key_weight", "value_weight"), HALF)
    inputs |= dict.fromkeys(("transport", *GuardInputs._fields[3:]), FLOAT)
    attributes = [
        ir.Attr("num_heads", ir.AttributeType.INT, None),
        ir.Attr("scale", ir.AttributeType.FLOAT, None),
    ]
    return define_function("ProjectedAttention", body, inputs, ["y"], attributes)


def _identity() -> npt.NDArray[np.float32]:
    """The band of the transport that moves nothing, for all tokens: [1, 145, 1, 1]."""
    offsets = diamond_offsets(STATE_RADIUS)
    band = np.array([offset == (0, 0) for offset in offsets], np.float32)
    return band[None, :, None, None]

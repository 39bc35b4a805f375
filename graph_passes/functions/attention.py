"""`sws.Attention` and `sws.CrossAttention`: one attention site with mixed keys and values."""

import dataclasses
from typing import Any

import onnx_ir as ir

from graph_passes.errors import GraphError
from graph_passes.functions.building import (
    Op,
    attribute_int,
    branch,
    cast,
    define_function,
    join_heads,
    logit_factor,
    mixed,
    per_sample,
    split_heads,
    true_for_any,
)
from graph_passes.functions.key_guard_fused import branching_site
from graph_passes.functions.key_guard_inputs import GuardInputs
from graph_passes.guard import ROW_STRIDES, GuardOptions
from graph_passes.parameters import STATE_RADIUS, SwsParameters
from graph_passes.target import Target

FLOAT = ir.DataType.FLOAT


def build_attention(
    parameters: SwsParameters,
    dtype: ir.DataType,
    target: Target,
    guard: GuardOptions,
    *,
    site_metrics: bool = False,
    cross: bool = False,
) -> ir.Function:
    """`Attention(q, k, v [B, T, C], transport, tau_q, amplitude, kappa, key_gate, value_gain) -> y`.

    q, k, v and y are [B, T, C] of the model's dtype. Attributes: `num_heads` and `scale` (of the logits).
    `CrossAttention` has keys and values [B, L, C] of the text, and a transport with a single row. If the
    guard evaluates a share of the rows, if only for the KL divergence, it has one more input at the end,
    `query_grid` [2] int64: rows and columns of the grid of the queries.
    Mixing is written `k + alpha * (k_perm - k)`, so that alpha = 0 gives exactly k. With `branches`, a step
    in which no sample has an amplitude computes the attention of q, k and v alone.

    Args:
        parameters: Constants of the method; `KeyGuard` carries those that its plugin needs.
        dtype: Of the model's activations.
        target: Runtime that the graph is for.
        guard: How the key guard is computed. On a share of the query rows it evaluates a lattice over the
            grid, see `sampled_rows` and `lattice_rows`.
        site_metrics: Give a second output [B, 1, 6] float32: `SITE_METRICS` of debug_outputs.
        cross: Build `CrossAttention`.

    Raises:
        GraphError: The share of rows is not supported.
    """
    if guard.rows not in ROW_STRIDES:
        allowed = ", ".join(str(share) for share in ROW_STRIDES)
        raise GraphError(f"guard rows: {guard.rows} is not supported; use one of {allowed}")
    strides = ROW_STRIDES[guard.rows]
    sampled = guard.rows != 1
    selects_queries = sampled and not guard.kl_only
    # The attention that evaluates the divergence can then be the site's own.
    carries_values = guard.form == "fused" and target.branches and not sampled and dtype == FLOAT

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
        query_grid: Any = None,
    ) -> Any:
        if cross:
            # On a single row, tiles of 8 x 8 with a halo of 8 would be nearly empty.
            k_perm, v_perm = op.DenseTransport(transport, k, v, _domain="sws", _outputs=2)
        else:
            k_perm, v_perm = op.BandedTransport(
                transport, k, v, radius=STATE_RADIUS, tensors=2, _domain="sws", _outputs=2
            )
        if sampled and not cross:
            query_grid = op.Shape(transport, start=2, end=4)
        site = _Site(q, k, v, k_perm, v_perm, tau_q, target, dtype)
        per_batch = (tau_q, amplitude, kappa, key_gate, value_gain)

        def with_sws(op: Op) -> tuple[Any, Any, Any]:
            if carries_values:
                inputs = GuardInputs(q, k, k_perm, *per_batch)
                return branching_site(op, parameters, inputs, v, v_perm, site.attend_mixed)
            rows = sampled_rows(op, q, query_grid, strides, dtype) if selects_queries else q
            kl_rows = [lattice_rows(op, query_grid, strides)] if guard.kl_only else []
            alpha_k, a_v = op.KeyGuard(
                *GuardInputs(rows, k, k_perm, *per_batch),
                *kl_rows,
                num_heads=ir.RefAttr("num_heads", "num_heads", ir.AttributeType.INT),
                scale=ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT),
                key_cap=parameters.key_cap,
                bisection_steps=parameters.bisection_steps,
                _domain="sws",
                _outputs=2,
            )
            return alpha_k, a_v, site.attend_mixed(op, alpha_k, a_v)

        def without_sws(op: Op) -> tuple[Any, Any, Any]:
            nothing = op.Mul(amplitude, 0.0)
            return nothing, nothing, site.attend(op, k, v)

        if target.branches:
            active = true_for_any(op, op.Greater(amplitude, 0.0))
            alpha_k, a_v, y = branch(op, active, with_sws, without_sws, 3, dtype)
        else:
            alpha_k, a_v, y = with_sws(op)
        return (y, _site_metrics(op, q, k, k_perm, tau_q, alpha_k, a_v)) if site_metrics else y

    inputs = dict.fromkeys(("q", "k", "v"), dtype)
    inputs |= dict.fromkeys(("transport", "tau_q", "amplitude", "kappa", "key_gate", "value_gain"), FLOAT)
    if sampled and cross:
        inputs["query_grid"] = ir.DataType.INT64
    return define_function(
        "CrossAttention" if cross else "Attention",
        body,
        inputs,
        ["y", "site_metrics"] if site_metrics else ["y"],
        [ir.Attr("num_heads", ir.AttributeType.INT, None), ir.Attr("scale", ir.AttributeType.FLOAT, None)],
    )


@dataclasses.dataclass(frozen=True)
class _Site:
    """The tensors of a site, [B, T, C] of `dtype` each, and the temperature of its queries, [B]."""

    q: Any
    k: Any
    v: Any
    k_perm: Any
    v_perm: Any
    tau_q: Any
    target: Target
    dtype: ir.DataType

    def attend(self, op: Op, keys: Any, values: Any) -> Any:
        """The output of the site for `keys` and `values`, [B, T, C] each."""
        if self.target.unscaled_attention:
            return self._attend_unscaled(op, split_heads(op, keys), split_heads(op, values))
        scale = ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT)
        temperature = cast(op, per_sample(op, self.tau_q, 3), self.dtype, FLOAT)
        operands = (op.Div(self.q, temperature), keys, values)
        if self.target.split_heads:
            return join_heads(op, op.Attention(*(split_heads(op, x) for x in operands), scale=scale))
        return op.Attention(
            *operands,
            q_num_heads=ir.RefAttr("q_num_heads", "num_heads", ir.AttributeType.INT),
            kv_num_heads=ir.RefAttr("kv_num_heads", "num_heads", ir.AttributeType.INT),
            scale=scale,
        )

    def attend_mixed(self, op: Op, key_share: Any, value_share: Any) -> Any:
        """The output of the site with mixed keys and values; shares are [B]."""
        key_share, value_share = (cast(op, x, self.dtype, FLOAT) for x in (key_share, value_share))
        values = mixed(op, self.v, self.v_perm, value_share)
        if not self.target.unscaled_attention:
            return self.attend(op, mixed(op, self.k, self.k_perm, key_share), values)
        # Keys and their change are those of the guard: with their heads split, as it has them.
        keys, change = split_heads(op, self.k), split_heads(op, op.Sub(self.k_perm, self.k))
        keys = op.Add(keys, op.Mul(per_sample(op, key_share, 4), change))
        return self._attend_unscaled(op, keys, split_heads(op, values))

    def _attend_unscaled(self, op: Op, keys: Any, values: Any) -> Any:
        """The output for `keys` and `values` [B, h, T, D], with the scale in the queries."""
        factor = cast(op, logit_factor(op, self.tau_q), self.dtype, FLOAT)
        query = op.Mul(split_heads(op, self.q), factor)
        return join_heads(op, op.Attention(query, keys, values, scale=1.0))


def _site_metrics(op: Op, q: Any, k: Any, k_perm: Any, tau_q: Any, alpha_k: Any, a_v: Any) -> Any:
    """alpha_k, a_v and the metrics of `SiteMetrics`, [B, 1, 6] float32."""
    attributes = {
        "num_heads": ir.RefAttr("num_heads", "num_heads", ir.AttributeType.INT),
        "scale": ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT),
    }
    computed = op.SiteMetrics(q, k, k_perm, tau_q, alpha_k, **attributes, _domain="sws")
    shares = [op.Unsqueeze(share, [1, 2]) for share in (alpha_k, a_v)]
    return op.Concat(*shares, op.Unsqueeze(computed, [1]), axis=2)


def sampled_rows(op: Op, q: Any, size: Any, strides: tuple[int, int], dtype: ir.DataType) -> Any:
    """Some rows of the queries q [B, T, C] on the grid of `size` [2] int64, as [B, T', C].

    First those of `lattice_rows`. A lattice preserves means over rows, but not the lowest and highest
    entropy. Rows of long queries have a low entropy and rows of short ones a high entropy; therefore the
    longest and the shortest query of each head are appended. They have the same weight in means as other
    rows.
    """
    # Not a Slice with steps, whose bounds are 28 layers in TensorRT.
    lattice = op.Gather(q, op.Cast(lattice_rows(op, size, strides), to=int(ir.DataType.INT32)), axis=1)

    heads = op.Reshape(q, op.Concat([0, 0], attribute_int(op, "num_heads"), [-1], axis=0))
    squared = op.ReduceSumSquare(cast(op, heads, FLOAT, dtype), [3], keepdims=1)
    # Of both signs, since each ArgMax has two layers of casts in TensorRT.
    places = op.Transpose(op.ArgMax(op.Mul(squared, [1.0, -1.0]), axis=1), perm=[0, 3, 2, 1])
    channels = op.Concat([1, 1, 1], op.Shape(heads, start=3, end=4), axis=0)
    extremes = op.GatherElements(heads, op.Expand(places, channels), axis=1)
    return op.Concat(lattice, op.Reshape(extremes, [0, 0, -1]), axis=1)


def lattice_rows(op: Op, size: Any, strides: tuple[int, int]) -> Any:
    """Indices [N] int64 of the rows of a lattice with the given strides on a grid of `size` [2] int64.

    It starts at the second row and column, where there are so many, so the border is not overrepresented.
    """
    tokens = op.Reshape(op.Range(0, op.ReduceProd(size, keepdims=0), 1), size)
    starts = op.Min([min(stride - 1, 1) for stride in strides], op.Sub(size, [1, 1]))
    return op.Reshape(op.Slice(tokens, starts, [2**31, 2**31], [0, 1], list(strides)), [-1])

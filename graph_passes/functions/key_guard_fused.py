"""`sws.KeyGuard` from fused attention alone: no T x T tensor outlives an `Attention` node.

The divergence grows with the share of transported keys, so that the bisection of the literal form ends at the
largest step of its grid whose divergence is within the budget, whichever way that step is found.

The straight-line form always evaluates three divergences. It can miss the step where a few rows of extreme
logits carry the divergence and the budget binds far below the cap; docs/performance.md says how often.

The form with branches proves its step, and skips what a bound or one evaluation settles. No branch makes a
step longer than all of them do, so that the work of a step is bounded.
"""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from graph_passes.errors import GraphError
from graph_passes.functions.building import Op, branch, mixed, true_for_any
from graph_passes.functions.entropy_factor import entropy_factor
from graph_passes.functions.materialized_statistics import MaterializedStatistics
from graph_passes.functions.row_statistics import RowStatistics, join_heads, split_heads
from graph_passes.functions.step_search import few_evaluations, proven_step
from graph_passes.parameters import SwsParameters

MIN_BUDGET = 1e-3
"""Smallest KL budget (nats) that float32 statistics tell from rounding."""
MAX_STEPS = 8
"""Most halvings whose steps the evaluations tell apart."""


def check_fused_guard(parameters: SwsParameters) -> None:
    """Refuse parameters for which the fused guard is not known to find the literal form's step.

    Raises:
        GraphError: The smallest KL budget at which keys are mixed is below `MIN_BUDGET`, or the grid is finer
            than `MAX_STEPS` halvings.
    """
    budget = parameters.kl_floor + parameters.kl_slope * max(0.0, 1.0 - parameters.u_stop)
    if budget < MIN_BUDGET:
        raise GraphError(
            f"guard fused: the KL budget falls to {budget:.3g} nats, and below {MIN_BUDGET:g} rounding "
            "decides; use guard literal, or raise kl_floor or kl_slope"
        )
    if parameters.bisection_steps > MAX_STEPS:
        raise GraphError(
            f"guard fused: bisection_steps is {parameters.bisection_steps}, and the fused guard resolves "
            f"at most {MAX_STEPS}; use guard literal"
        )


def branchless_guard(
    op: Op,
    parameters: SwsParameters,
    dtype: ir.DataType,
    q: Any,
    k: Any,
    k_perm: Any,
    tau_q: Any,
    amplitude: Any,
    kappa: Any,
    key_gate: Any,
    *,
    stored: bool,
) -> tuple[Any, Any]:
    """The share of transported keys and the amplitude a, [B] float32 each; `dtype` is that of q and keys.

    `stored` is for a runtime that stores logits anyway: it needs half as many nodes.
    """
    given = (op, q, k, k_perm, tau_q, dtype)
    rows = MaterializedStatistics(*given) if stored else RowStatistics(*given, branches=False)
    mix = _mix(op, amplitude, rows)
    unit = _unit(op, parameters, mix, key_gate)
    divergence = rows.divergence if isinstance(rows, MaterializedStatistics) else rows.divergence(op)
    last = 2**parameters.bisection_steps - 1
    step = few_evaluations(op, lambda op, n: divergence(op, op.Mul(unit, n)), kappa, last)
    return op.Mul(unit, step), mix


def branching_guard(
    op: Op,
    parameters: SwsParameters,
    dtype: ir.DataType,
    q: Any,
    k: Any,
    k_perm: Any,
    tau_q: Any,
    amplitude: Any,
    kappa: Any,
    key_gate: Any,
) -> tuple[Any, Any]:
    """As `branchless_guard`, with branches; nothing is computed where no sample has an amplitude."""

    def found(op: Op) -> tuple[Any, Any]:
        rows = RowStatistics(op, q, k, k_perm, tau_q, dtype, branches=True)
        mix = _mix(op, amplitude, rows)
        search = _Search(op, parameters, rows, _unit(op, parameters, mix, key_gate), kappa)
        value = branch(
            op,
            search.undecided,
            lambda op: rows.divergence(op, search.last)(op, search.last),
            search.no_divergence,
            1,
        )
        return search.largest_share(op, search.binds(op, value), value), mix

    nothing = op.Mul(amplitude, 0.0)
    active = true_for_any(op, op.Greater(amplitude, 0.0))
    share, mix = branch(op, active, found, lambda _: (nothing, nothing), 2)
    return share, mix


def branching_site(
    op: Op,
    parameters: SwsParameters,
    q: Any,
    k: Any,
    v: Any,
    k_perm: Any,
    v_perm: Any,
    tau_q: Any,
    amplitude: Any,
    kappa: Any,
    key_gate: Any,
    value_gain: Any,
    attend: Callable[[Op, Any, Any], Any],
) -> tuple[Any, Any, Any]:
    """The shares of transported keys and values, [B] each, and the output [B, T, C] of a float32 site.

    The attention that evaluates the divergence at the last step carries the values along, and is the site's
    own where that step is allowed; not where a sample has no amplitude, which stays plain bit for bit.

    Args:
        op: Builder.
        parameters: Constants of the method.
        q: Queries [B, T, C]; k, v, k_perm and v_perm likewise.
        k: Keys.
        v: Values.
        k_perm: Transported keys.
        v_perm: Transported values.
        tau_q: Temperature, [B]; all that follow likewise.
        amplitude: Strength before the entropy factor.
        kappa: Budget in nats.
        key_gate: 0 where keys are left alone, else 1.
        value_gain: Share of transported values at a strength of 1.
        attend: (op, share of keys, share of values) -> the site's output.
    """

    def found(op: Op) -> tuple[Any, Any, Any]:
        rows = RowStatistics(op, q, k, k_perm, tau_q, ir.DataType.FLOAT, branches=True)
        mix = _mix(op, amplitude, rows)
        value_share = op.Clip(op.Mul(mix, value_gain), 0.0, 1.0)
        search = _Search(op, parameters, rows, _unit(op, parameters, mix, key_gate), kappa)

        def together(op: Op) -> tuple[Any, Any]:
            values = split_heads(op, mixed(op, v, v_perm, value_share))
            value, y = rows.divergence(op, search.last).with_output(op, search.last, values)
            return value, join_heads(op, y)

        value, carried = branch(op, search.undecided, together, lambda op: (search.no_divergence(op), q), 2)
        binds = search.binds(op, value)
        share = search.largest_share(op, binds, value)
        left_plain = true_for_any(op, op.LessOrEqual(mix, 0.0))
        done = op.And(search.undecided, op.Not(op.Or(binds, left_plain)))
        y = branch(op, done, lambda _: carried, lambda op: attend(op, share, value_share), 1)
        return share, value_share, y

    def plain(op: Op) -> tuple[Any, Any, Any]:
        nothing = op.Mul(amplitude, 0.0)
        return nothing, nothing, attend(op, nothing, nothing)

    active = true_for_any(op, op.Greater(amplitude, 0.0))
    share, value_share, y = branch(op, active, found, plain, 3)
    return share, value_share, y


class _Search:
    """For the largest share of transported keys that the budget allows.

    Attributes:
        last: The largest share of the grid, [B].
        undecided: Whether the bound leaves open, in some sample, that `last` is allowed.
    """

    def __init__(self, op: Op, parameters: SwsParameters, rows: RowStatistics, unit: Any, kappa: Any) -> None:
        self._halvings = parameters.bisection_steps
        self._rows = rows
        self._unit = unit
        self._kappa = kappa
        self.last = op.Mul(unit, 2.0**self._halvings - 1)
        self.undecided = self.binds(op, rows.divergence_bound(op, self.last))

    def binds(self, op: Op, divergence: Any) -> Any:
        """Whether a divergence exceeds the budget in some sample; one that is not a number does."""
        return true_for_any(op, op.Not(op.LessOrEqual(divergence, self._kappa)))

    def no_divergence(self, op: Op) -> Any:
        """Zeros, which stand for a divergence that is known to be allowed."""
        return op.Mul(self._kappa, 0.0)

    def largest_share(self, op: Op, binds: Any, value: Any) -> Any:
        """`last`, or what a search finds where the divergence there, `value`, `binds` in some sample."""

        def searched(op: Op) -> Any:
            divergence = self._rows.divergence(op, self.last)
            return op.Mul(
                self._unit,
                proven_step(
                    op,
                    lambda op, step: divergence(op, op.Mul(self._unit, step)),
                    self._kappa,
                    self._halvings,
                    value,
                ),
            )

        return branch(op, binds, searched, lambda _: self.last, 1)


def _mix(op: Op, amplitude: Any, rows: RowStatistics | MaterializedStatistics) -> Any:
    return op.Clip(op.Mul(amplitude, entropy_factor(op, rows.entropy)), 0.0, 1.0)


def _unit(op: Op, parameters: SwsParameters, mix: Any, key_gate: Any) -> Any:
    """The share of transported keys of one step of the grid, [B]; 0 where keys are left alone."""
    return op.Mul(op.Mul(mix, key_gate), parameters.key_cap / 2**parameters.bisection_steps)

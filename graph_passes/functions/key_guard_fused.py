"""The fused form of `sws.KeyGuard` with branches, which computes its statistics with `Attention` nodes.

The divergence KL(alpha) is monotone. The bisection of the literal form therefore ends at the largest step n
of its grid, alpha = n unit, with KL(n unit) within the budget, and any search that finds this step gives the
same result. The grid has 2^bisection_steps steps up to key_cap a.

The guard finds the exact step, and skips evaluations that a bound or an earlier evaluation makes unnecessary.
The work of a step is bounded by that of all branches together.
"""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from graph_passes.functions.building import Op, branch, join_heads, mixed, split_heads, true_for_any
from graph_passes.functions.entropy_factor import entropy_factor
from graph_passes.functions.key_guard_inputs import GuardInputs
from graph_passes.functions.row_statistics import RowStatistics
from graph_passes.functions.step_search import exact_step
from graph_passes.parameters import SwsParameters


def branching_guard(
    op: Op,
    parameters: SwsParameters,
    dtype: ir.DataType,
    inputs: GuardInputs,
    kl_rows: Any = None,
) -> tuple[Any, Any]:
    """alpha_k and the amplitude a, [B] float32 each.

    Args:
        op: Builder.
        parameters: Constants of the method.
        dtype: Of the model's activations.
        inputs: Of `sws.KeyGuard`.
        kl_rows: Indices of the rows that the KL divergence is the mean of, [N] int64; None for all.
    """

    rows = RowStatistics(op, inputs, dtype, kl_rows)
    mix = _mix(op, inputs.amplitude, rows)
    search = _Search(op, parameters, rows, _unit(op, parameters, mix, inputs.key_gate), inputs.kappa)
    value = branch(
        op,
        search.undecided,
        lambda op: rows.divergence(op, search.last)(op, search.last),
        search.no_divergence,
        1,
    )
    return search.largest_share(op, search.binds(op, value), value), mix


def branching_site(
    op: Op,
    parameters: SwsParameters,
    inputs: GuardInputs,
    v: Any,
    v_perm: Any,
    attend: Callable[[Op, Any, Any], Any],
) -> tuple[Any, Any, Any]:
    """alpha_k and a_v, [B] each, and the output [B, T, C] of a float32 site.

    The attention that evaluates the divergence at the last step computes the output for that step as well, as
    further value channels. It is the site's output if all samples allow that step. If a sample has the
    amplitude 0, `attend` computes the output instead, since it must be exactly that of plain attention.

    Args:
        op: Builder.
        parameters: Constants of the method.
        inputs: Of `sws.KeyGuard`, float32, with all query rows.
        v: Values [B, T, C].
        v_perm: Transported values, as `v`.
        attend: (op, alpha_k, a_v) -> the site's output [B, T, C].
    """

    rows = RowStatistics(op, inputs, ir.DataType.FLOAT)
    mix = _mix(op, inputs.amplitude, rows)
    value_share = op.Clip(op.Mul(mix, inputs.value_gain), 0.0, 1.0)
    search = _Search(op, parameters, rows, _unit(op, parameters, mix, inputs.key_gate), inputs.kappa)

    def together(op: Op) -> tuple[Any, Any]:
        values = split_heads(op, mixed(op, v, v_perm, value_share))
        value, y = rows.divergence(op, search.last).with_output(op, search.last, values)
        return value, join_heads(op, y)

    value, carried = branch(
        op, search.undecided, together, lambda op: (search.no_divergence(op), inputs.q), 2
    )
    binds = search.binds(op, value)
    share = search.largest_share(op, binds, value)
    left_plain = true_for_any(op, op.LessOrEqual(mix, 0.0))
    done = op.And(search.undecided, op.Not(op.Or(binds, left_plain)))
    y = branch(op, done, lambda _: carried, lambda op: attend(op, share, value_share), 1)
    return share, value_share, y


class _Search:
    """The search for the largest alpha_k within the budget.

    Attributes:
        last: alpha_k at the last step of the grid, [B].
        undecided: Whether the upper bound of the divergence at `last` exceeds the budget in some sample.
    """

    def __init__(self, op: Op, parameters: SwsParameters, rows: RowStatistics, unit: Any, kappa: Any) -> None:
        self._halvings = parameters.bisection_steps
        self._rows = rows
        self._unit = unit
        self._kappa = kappa
        self.last = op.Mul(unit, 2.0**self._halvings - 1)
        self.undecided = self.binds(op, rows.divergence_bound(op, self.last))

    def binds(self, op: Op, divergence: Any) -> Any:
        """Whether a divergence [B] exceeds the budget in some sample; NaN exceeds it."""
        return true_for_any(op, op.Not(op.LessOrEqual(divergence, self._kappa)))

    def no_divergence(self, op: Op) -> Any:
        """Zeros [B], in place of a divergence that is known to be within the budget."""
        return op.Mul(self._kappa, 0.0)

    def largest_share(self, op: Op, binds: Any, value: Any) -> Any:
        """`last`, or the result of a search if `value`, the divergence at `last`, `binds`; [B]."""

        def searched(op: Op) -> Any:
            divergence = self._rows.divergence(op, self.last)
            return op.Mul(
                self._unit,
                exact_step(
                    op,
                    lambda op, step: divergence(op, op.Mul(self._unit, step)),
                    self._kappa,
                    self._halvings,
                    value,
                ),
            )

        return branch(op, binds, searched, lambda _: self.last, 1)


def _mix(op: Op, amplitude: Any, rows: RowStatistics) -> Any:
    """The amplitude a, [B]."""
    return op.Clip(op.Mul(amplitude, entropy_factor(op, rows.entropy)), 0.0, 1.0)


def _unit(op: Op, parameters: SwsParameters, mix: Any, key_gate: Any) -> Any:
    """alpha_k at the first step of the grid, [B]; 0 if the key gate is 0."""
    return op.Mul(op.Mul(mix, key_gate), parameters.key_cap / 2**parameters.bisection_steps)

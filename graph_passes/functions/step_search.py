"""Search for the largest step of a grid at which a divergence is within its budget.

Steps n are integers, stored as float32; the divergence is monotone in n. log(KL / n^2) is nearly linear in n,
so the next step to evaluate is extrapolated from the last two evaluations.
"""

import functools
from collections.abc import Callable
from typing import Any

from graph_passes.functions.building import Op, branch, true_for_any

_MIN_DIVERGENCE = 1e-9

DivergenceAt = Callable[[Op, Any], Any]
"""(op, step [B]) -> KL [B]."""


def exact_step(op: Op, divergence: DivergenceAt, kappa: Any, halvings: int, value: Any) -> Any:
    """The largest n in 0 .. last with divergence(n) <= kappa, [B] float32; last is 2^halvings - 1.

    Evaluates, each time in a branch, until in every sample some n is within the budget and n + 1 is not. The
    first two steps are not restricted; later ones leave at most as many candidates as bisection can resolve
    with the remaining evaluations, so halvings + 2 evaluations are enough for any divergence.

    Args:
        op: Builder.
        divergence: The divergence at a step.
        kappa: Budget, [B].
        halvings: Logarithm of the number of steps.
        value: The divergence at `last`, [B].
    """
    last = float(2**halvings - 1)
    within = op.LessOrEqual(value, kappa)
    nothing = op.Mul(kappa, 0.0)
    step = op.Add(nothing, last)
    low, high = op.Where(within, step, nothing), op.Add(op.Where(within, 1.0, 0.0), last)
    log_budget = _log(op, kappa)
    state = [low, high, *_extrapolated(op, log_budget, step, value, None)]
    for left in range(halvings + 1, -1, -1):
        reach = 2.0**left if left < halvings else None
        advance = functools.partial(_advanced, state, divergence, kappa, log_budget, reach)
        unproven = true_for_any(op, op.Greater(op.Sub(state[1], state[0]), 1.5))
        state = branch(op, unproven, advance, functools.partial(_kept, state), len(state))
    return state[0]


def _advanced(
    state: list[Any], divergence: DivergenceAt, kappa: Any, log_budget: Any, reach: float | None, op: Op
) -> list[Any]:
    """The state after one more evaluation, at most `reach` away from both ends of the interval."""
    low, high, root, *earlier = state
    least, most = op.Add(low, 1.0), op.Sub(high, 1.0)
    if reach is not None:
        least, most = op.Max(least, op.Sub(high, reach)), op.Min(most, op.Add(low, reach))
    step = op.Max(op.Min(op.Max(op.Round(root), least), most), 1.0)
    value = divergence(op, step)
    low, high = _narrowed(op, low, high, step, op.LessOrEqual(value, kappa))
    return [low, high, *_extrapolated(op, log_budget, step, value, earlier)]


def _kept(state: list[Any], _: Op) -> list[Any]:
    return state


def _narrowed(op: Op, low: Any, high: Any, step: Any, within: Any) -> tuple[Any, Any]:
    """The highest step known to be within the budget, and the lowest known to exceed it."""
    return op.Where(within, op.Max(low, step), low), op.Where(within, high, op.Min(high, step))


def _extrapolated(op: Op, log_budget: Any, step: Any, value: Any, earlier: list[Any] | None) -> list[Any]:
    """The step where the line through the last two evaluations meets the budget; n and log(KL / n^2) here."""
    log_step, log_value = op.Log(step), _log(op, value)
    level = op.Sub(log_value, op.Mul(log_step, 2.0))
    power: Any = 2.0
    if earlier is not None:
        run = op.Sub(step, earlier[0])
        # 0 if both evaluations are at the same step.
        slope = op.Div(op.Mul(op.Sub(level, earlier[1]), run), op.Add(op.Mul(run, run), 1e-3))
        power = op.Clip(op.Add(op.Mul(slope, step), 2.0), 1.0, 4.0)
    root = op.Exp(op.Add(log_step, op.Div(op.Sub(log_budget, log_value), power)))
    return [root, step, level]


def _log(op: Op, divergence: Any) -> Any:
    return op.Log(op.Max(divergence, _MIN_DIVERGENCE))

"""How far the outputs of a graph may be from the reference's."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from graph_passes.debug_outputs import PREFIX
from graph_passes.parameters import SwsParameters
from sws_export.tensors import Precision
from sws_export.validation.onnx_runner import STATE_PREFIX
from sws_export.validation.trajectory import Array

# Largest difference of the prediction, relative to its largest value.
_PREDICTION: dict[Precision, float] = {"fp32": 2e-4, "fp16": 2e-2, "bf16": 2e-2}
# A bisection that binds may fall on the other side of one of its steps by rounding alone.
_BINDING = 5e-4
# A guard that sees a share of the rows mixes by another amount; what it costs is for the user to judge.
_SAMPLED = 5e-2
_STATE = 1e-5
_FIGURE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 2e-2}
# A guard that sees a share of the rows finds others of these.
_DECIDED_BY_GUARD = ("alpha_k", "a_v", "kl")
# What one step more or less of the bisection, which rounding decides, changes: alpha_k, and its square.
_MOVED_BY_A_STEP = {"alpha_k": 1, "kl": 2}
# Small against the logits that they are differences of, whose digits float32 ends.
_DIFFERENCES_OF_LOGITS = ("entropy_min", "kl")
_NATS = 1e-4


def allowed_differences(
    expected: Sequence[Mapping[str, Array]],
    parameters: SwsParameters,
    guard_rows: Fraction,
    precision: Precision,
) -> dict[str, float]:
    """The outputs to compare, each with the largest difference allowed, relative to its largest value.

    Args:
        expected: Outputs of the reference at each step.
        parameters: What the graph was exported with.
        guard_rows: Share of the query rows that the guard sees.
        precision: Of the export.
    """
    sampled = 0.0 if guard_rows == 1 else _SAMPLED
    tolerances = {}
    for name in expected[0]:
        if name == "out_sample":
            budget = parameters.kl_floor + parameters.kl_slope
            exact = _BINDING if precision == "fp32" and budget < 1e-3 else _PREDICTION[precision]
            tolerances[name] = max(sampled, exact)
        elif name.startswith(STATE_PREFIX):
            tolerances[name] = _STATE
        elif not sampled or name.removeprefix(PREFIX) not in _DECIDED_BY_GUARD:
            tolerances[name] = max(sampled, _FIGURE[precision])
    step = parameters.key_cap / 2**parameters.bisection_steps
    for figure, powers in _MOVED_BY_A_STEP.items():
        _allow(tolerances, figure, powers * step, _largest(expected, "alpha_k"))
    for figure in _DIFFERENCES_OF_LOGITS:
        _allow(tolerances, figure, _NATS, _largest(expected, figure))
    return tolerances


def _allow(tolerances: dict[str, float], figure: str, difference: float, largest: float) -> None:
    """Allow an absolute difference beside the relative one, where the figure is compared."""
    name = f"{PREFIX}{figure}"
    if name in tolerances:
        tolerances[name] += difference / largest


def _largest(expected: Sequence[Mapping[str, Array]], figure: str) -> float:
    """The largest value of a figure, of the step where that is least but not 0."""
    name = f"{PREFIX}{figure}"
    largest = [float(np.max(outputs[name])) for outputs in expected if name in outputs]
    return min((value for value in largest if value > 0), default=float("inf"))

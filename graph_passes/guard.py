"""How the key guard is computed: the options, and the parameters that the fused form supports."""

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

from graph_passes.parameters import SwsParameters

GuardForm = Literal["literal", "fused"]
"""`literal` evaluates each step of the bisection on materialized logits; `fused` finds the same step without
them, from a few attentions."""

ROW_STRIDES: Mapping[Fraction, tuple[int, int]] = {
    Fraction(1): (1, 1),
    Fraction(1, 2): (1, 2),
    Fraction(1, 4): (2, 2),
    Fraction(1, 8): (4, 2),
    Fraction(1, 16): (4, 4),
}
"""Supported shares of the query rows, and the strides (rows, columns) of the grid that each one samples."""

KL_ONLY = "kl:"
"""Prefix of a share of the query rows that only the KL divergence is evaluated on."""

MIN_BUDGET = 1e-3
"""Smallest KL budget (nats) at which float32 rounding does not decide the step of the fused guard."""
MAX_STEPS = 8
"""Most halvings whose steps the fused guard resolves."""


@dataclasses.dataclass(frozen=True)
class GuardOptions:
    """How the key guard is computed.

    Attributes:
        form: `literal` or `fused`.
        rows: Share of the query rows that the guard evaluates; below 1 the result is an approximation.
        kl_only: `rows` are those of the KL divergence, on a lattice alone; entropies are of all rows.
    """

    form: GuardForm = "literal"
    rows: Fraction = Fraction(1)
    kl_only: bool = False

    @classmethod
    def parse(cls, form: GuardForm, rows: str) -> "GuardOptions":
        """The options for a share of the rows as text: `1`, `1/8`, or `kl:1/8`.

        Raises:
            ValueError: The share is none of `ROW_STRIDES`.
        """
        text = rows.removeprefix(KL_ONLY)
        try:
            share = Fraction(text)
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if share not in ROW_STRIDES:
            raise ValueError(f"expected one of {', '.join(map(str, ROW_STRIDES))}")
        return cls(form, share, kl_only=text != rows and share != 1)

    @property
    def rows_text(self) -> str:
        """The share of the rows as `parse` reads it."""
        return f"{KL_ONLY if self.kl_only else ''}{self.rows}"

    @property
    def kl_strides(self) -> tuple[int, int]:
        """Strides (rows, columns) of the grid whose query rows the KL divergence is the mean of.

        (1, 1) unless `kl_only`: with a share of all statistics the definition has all rows.
        """
        return ROW_STRIDES[self.rows] if self.kl_only else (1, 1)

    @property
    def entropy_rows(self) -> Fraction:
        """Share of the query rows that entropies are computed from."""
        return Fraction(1) if self.kl_only else self.rows


def fused_guard_limit(parameters: SwsParameters) -> str | None:
    """Why the fused guard does not find the step of the literal guard with `parameters`; None if it does.

    The smallest KL budget at which keys are mixed must be at least `MIN_BUDGET`, and the bisection must
    have at most `MAX_STEPS` halvings.
    """
    budget = parameters.kl_floor + parameters.kl_slope * max(0.0, 1.0 - parameters.u_stop)
    if budget < MIN_BUDGET:
        return (
            f"guard fused: the KL budget falls to {budget:.3g} nats, and below {MIN_BUDGET:g} rounding "
            "decides; use guard literal, or raise kl_floor or kl_slope"
        )
    if parameters.bisection_steps > MAX_STEPS:
        return (
            f"guard fused: bisection_steps is {parameters.bisection_steps}, and the fused guard resolves "
            f"at most {MAX_STEPS}; use guard literal"
        )
    return None

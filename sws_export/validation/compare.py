"""Differences between two sets of outputs."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from sws_export.errors import ValidationError
from sws_export.validation.trajectory import Array, Floats

_QUANTILE = 0.999


@dataclasses.dataclass(frozen=True)
class OutputDifference:
    """Differences of one output over all steps, relative to the largest absolute value of the reference.

    Attributes:
        name: Name of the output.
        maximum: Largest elementwise difference.
        mean: Mean difference of the step with the largest mean.
        quantile: 99.9th percentile of the differences of the step with the largest one.
        tolerance: Largest `maximum` that passes.
    """

    name: str
    maximum: float
    mean: float
    quantile: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the output is within tolerance; False for NaN."""
        return self.maximum <= self.tolerance


def compare_outputs(
    actual: dict[str, Array], expected: dict[str, Array], tolerances: dict[str, float]
) -> list[OutputDifference]:
    """Compare the outputs of one step.

    Args:
        actual: Outputs of the graph; NaN or Inf gives an infinite difference.
        expected: Outputs of the reference; only these are compared.
        tolerances: Largest relative difference of each output.
    """
    from polygraphy.comparator import IterationResult, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    scale = {name: float(np.abs(values).max()) or 1.0 for name, values in expected.items()}
    scaled_actual = {name: np.asarray(actual[name], np.float64) / scale[name] for name in expected}
    scaled_expected = {
        name: np.asarray(values, np.float64) / scale[name] for name, values in expected.items()
    }
    compare = SimpleCompareFunc(atol=tolerances, rtol=0.0, check_error_stat="max")
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        results = compare(IterationResult(scaled_actual), IterationResult(scaled_expected))
    return [
        OutputDifference(
            name,
            maximum=_finite_or_inf(result.max_absdiff),
            mean=_finite_or_inf(result.mean_absdiff),
            # Polygraphy computes a quantile only if `check_error_stat` is "quantile".
            quantile=_finite_or_inf(_quantile(scaled_actual[name], scaled_expected[name])),
            tolerance=tolerances[name],
        )
        for name, result in results.items()
    ]


def _quantile(actual: Floats, expected: Floats) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.quantile(np.abs(actual - expected), _QUANTILE))


def _finite_or_inf(difference: float) -> float:
    return difference if np.isfinite(difference) else float("inf")


def max_over_steps(steps: list[list[OutputDifference]]) -> tuple[OutputDifference, ...]:
    """The maximum of each metric over all steps, for each output."""
    return tuple(
        OutputDifference(
            outputs[0].name,
            maximum=max(output.maximum for output in outputs),
            mean=max(output.mean for output in outputs),
            quantile=max(output.quantile for output in outputs),
            tolerance=outputs[0].tolerance,
        )
        for outputs in zip(*steps, strict=True)
    )


def require_tolerances(outputs: Sequence[OutputDifference], reference: str, remedy: str = "") -> None:
    """Check that every output of an export is within its tolerance.

    Args:
        outputs: Differences from the reference.
        reference: What the graph was compared with, for the message.
        remedy: What to do about a difference, for the message.

    Raises:
        ValidationError: Names the output that exceeds its tolerance most.
    """
    failed = [output for output in outputs if not output.passed]
    if not failed:
        return
    worst = max(failed, key=lambda output: output.maximum / output.tolerance)
    if math.isinf(worst.maximum):
        raise ValidationError(
            f"{worst.name} of the graph has NaN or Inf, the {reference} has none: the precision is "
            "too small for this model; nothing was written. Export with --precision bf16 or fp32"
        )
    raise ValidationError(
        f"the graph differs from the {reference}: {worst.name} by {worst.maximum:.2g} of its largest "
        f"value, allowed is {worst.tolerance:.0e}; nothing was written. "
        f"{f'{remedy}. ' if remedy else ''}--no-validate skips the comparison"
    )

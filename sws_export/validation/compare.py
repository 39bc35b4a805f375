"""How far two outputs are apart."""

import dataclasses

import numpy as np

from sws_export.validation.trajectory import Array, Floats

_QUANTILE = 0.999


@dataclasses.dataclass(frozen=True)
class OutputDifference:
    """Differences of one output over all steps, relative to the reference's largest absolute value.

    Attributes:
        name: The output.
        maximum: Largest difference of an element.
        mean: Mean difference of the step where it is largest.
        quantile: 99.9 % of the elements differ by less, in the step where that is largest.
        tolerance: Largest `maximum` that passes.
    """

    name: str
    maximum: float
    mean: float
    quantile: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the output is within tolerance; NaN is not."""
        return self.maximum <= self.tolerance


def compare_outputs(
    found: dict[str, Array], expected: dict[str, Array], tolerances: dict[str, float]
) -> list[OutputDifference]:
    """Compare the outputs of one step; NaN or Inf in `found` differs without bound."""
    from polygraphy.comparator import IterationResult, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    scale = {name: float(np.abs(values).max()) or 1.0 for name, values in expected.items()}
    ours = {name: np.asarray(found[name], np.float64) / scale[name] for name in expected}
    theirs = {name: np.asarray(values, np.float64) / scale[name] for name, values in expected.items()}
    compare = SimpleCompareFunc(atol=tolerances, rtol=0.0, check_error_stat="max")
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        results = compare(IterationResult(ours), IterationResult(theirs))
    return [
        OutputDifference(
            name,
            maximum=_or_infinite(result.max_absdiff),
            mean=_or_infinite(result.mean_absdiff),
            # The comparator has a quantile only where it is the figure that decides.
            quantile=_or_infinite(_quantile(ours[name], theirs[name])),
            tolerance=tolerances[name],
        )
        for name, result in results.items()
    ]


def _quantile(ours: Floats, theirs: Floats) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.quantile(np.abs(ours - theirs), _QUANTILE))


def _or_infinite(difference: float) -> float:
    return difference if np.isfinite(difference) else float("inf")


def worst(steps: list[list[OutputDifference]]) -> tuple[OutputDifference, ...]:
    """The largest of each figure over all steps, output by output."""
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

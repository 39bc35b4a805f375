"""Means and changes over pairs, each with a 95 % bootstrap interval."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import DegenerateDataWarning, bootstrap

CONFIDENCE = 0.95
RESAMPLES = 2000

Floats = npt.NDArray[np.floating[Any]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A value over pairs.

    Attributes:
        value: Of all pairs; None without any.
        low: Lower end of the interval; None with fewer than two pairs.
        high: Upper end of the interval; None with fewer than two pairs.
        pairs: Number of pairs.
    """

    value: float | None
    low: float | None
    high: float | None
    pairs: int

    @property
    def is_nonzero(self) -> bool:
        """Whether the interval does not contain 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean(values: Sequence[float] | Floats) -> Figure:
    """The mean over pairs; NaN are left out.

    Args:
        values: One for each pair, [N].
    """
    given = np.asarray(values, np.float64)
    return _figure((given[~np.isnan(given)],), lambda sample, axis: sample.mean(axis=axis))


def mean_difference(values: Sequence[float] | Floats, plain: Sequence[float] | Floats) -> Figure:
    """The mean of the differences from the plain images of the same pairs; NaN are left out."""
    return mean(np.asarray(values, np.float64) - np.asarray(plain, np.float64))


def relative_change(values: Sequence[float] | Floats, plain: Sequence[float] | Floats) -> Figure:
    """Mean over pairs relative to the mean of the plain images of the same pairs, minus 1.

    Unlike a mean of ratios it is not dominated by pairs whose plain value is close to 0. Pairs with NaN are
    left out.
    """
    both = np.asarray([values, plain], np.float64)
    value, base = both[:, ~np.isnan(both).any(axis=0)]
    if not base.any():
        return Figure(None, None, None, len(base))
    return _figure((value, base), lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis) - 1.0)


def _figure(samples: tuple[Floats, ...], statistic: Callable[..., Any]) -> Figure:
    """Value of a statistic and its bias-corrected and accelerated bootstrap interval (Efron, 1987)."""
    count = len(samples[0])
    if count == 0:
        return Figure(None, None, None, 0)
    value = float(statistic(*samples, axis=0))
    if count == 1:
        return Figure(value, None, None, 1)
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        # The interval of a statistic that is the same for every resample is that value.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(
            samples,
            statistic,
            paired=len(samples) > 1,
            vectorized=True,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            rng=np.random.default_rng(0),
        )
    low, high = found.confidence_interval
    if np.isnan(low) or np.isnan(high):
        tails = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
        low, high = np.nanquantile(found.bootstrap_distribution, tails)
    return Figure(value, float(low), float(high), count)

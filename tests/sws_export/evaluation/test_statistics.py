"""Intervals over pairs."""

import numpy as np
import pytest

from sws_export.evaluation.statistics import Figure, mean, mean_difference, relative_change


def test_the_interval_covers_the_mean_19_times_in_20() -> None:
    random = np.random.default_rng(3)
    found = [mean(random.normal(1.0, 1.0, 30)) for _ in range(100)]
    covered = sum(f.low <= 1.0 <= f.high for f in found)  # type: ignore[operator]
    assert 87 <= covered <= 99
    # Of 30 normal values the interval of the mean has a half width of about 1.96 / sqrt(30).
    widths = [f.high - f.low for f in found]  # type: ignore[operator]
    assert np.mean(widths) / 2 == pytest.approx(1.96 / np.sqrt(30), rel=0.1)


def test_pairs_are_compared_with_themselves() -> None:
    random = np.random.default_rng(4)
    plain = random.uniform(1.0, 9.0, 20)
    figure = relative_change(1.1 * plain, plain)
    # Pairs differ by a factor of 9, and all change by a tenth.
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.1, 0.1, 0.1))
    assert figure.is_nonzero
    shifted = mean_difference(plain + random.normal(0.0, 0.1, 20), plain)
    assert -0.1 < shifted.low < 0.0 < shifted.high < 0.1  # type: ignore[operator]
    assert not shifted.is_nonzero


def test_what_has_no_interval() -> None:
    assert mean([2.0, float("nan")]) == Figure(2.0, None, None, 1)
    assert mean([float("nan")]) == Figure(None, None, None, 0)
    assert mean([3.0, 3.0, 3.0]) == Figure(3.0, 3.0, 3.0, 3)
    assert relative_change([0.0, 0.0], [0.0, 0.0]) == Figure(None, None, None, 2)
    assert relative_change([2.0, float("nan")], [1.0, 1.0]).value == 1.0
    assert mean([1.0, 2.0, 4.0, 9.0]) == mean([1.0, 2.0, 4.0, 9.0])

"""Differences relative to the largest expected value, and which of them pass."""

import numpy as np
import pytest

from sws_export.validation.compare import OutputDifference, compare_outputs, max_over_steps


def compared(actual: list[float], expected: list[float], tolerance: float = 0.1) -> OutputDifference:
    (difference,) = compare_outputs(
        {"out": np.array(actual, np.float32), "more": np.zeros(1)},
        {"out": np.array(expected)},
        {"out": tolerance},
    )
    return difference


def test_metrics_are_relative_to_the_largest_value() -> None:
    found = compared([1.0, 2.0, -19.0, 4.0], [1.0, 2.0, -20.0, 4.0])
    assert found.name == "out"
    assert found.maximum == pytest.approx(1 / 20)
    assert found.mean == pytest.approx(1 / 80)
    assert found.mean < found.quantile <= found.maximum
    assert found.passed


def test_the_tolerance_is_inclusive() -> None:
    assert compared([3.0], [4.0], 0.25).passed
    assert not compared([3.0], [4.0], 0.2499).passed


def test_an_output_of_zeros() -> None:
    assert compared([0.0, 0.0], [0.0, 0.0], 0.0).passed
    assert compared([0.05, 0.0], [0.0, 0.0]).maximum == pytest.approx(0.05)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_never_pass(value: float) -> None:
    found = compared([value, 1.0], [1.0, 1.0], tolerance=1e9)
    assert found.maximum == np.inf
    assert not found.passed


def test_the_maximum_of_all_steps() -> None:
    steps = [
        [OutputDifference("a", 0.1, 0.02, 0.05, 1.0), OutputDifference("b", 0.0, 0.0, 0.0, 2.0)],
        [OutputDifference("a", 0.2, 0.01, 0.06, 1.0), OutputDifference("b", 0.3, 0.1, 0.2, 2.0)],
    ]
    assert max_over_steps(steps) == (
        OutputDifference("a", 0.2, 0.02, 0.06, 1.0),
        OutputDifference("b", 0.3, 0.1, 0.2, 2.0),
    )

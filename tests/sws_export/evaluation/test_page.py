"""Texts of figures, and the axes of charts."""

import pytest

from sws_export.evaluation.page import PLOT_HEIGHT, _chart, number, percent
from sws_export.evaluation.statistics import Figure


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure(0.99998, 0.999971, 1.0, 4), "0.99998 (0.99997 to 1)"),
        (Figure(0.00866, 0.00597, 0.01182, 4), "0.00866 (0.00597 to 0.0118)"),
        (Figure(27.31, 25.0, 30.04, 4), "27.3 (25 to 30)"),
        (Figure(0.5, None, None, 1), "0.5"),
        (Figure(None, None, None, 0), "unknown"),
    ],
)
def test_values(figure: Figure, text: str) -> None:
    assert number(figure) == text


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure(-0.0226, -0.0269, 0.0145, 4), "-2.26% (-2.69 to +1.45)"),
        (Figure(0.1, None, None, 1), "+10.00%"),
        (Figure(None, None, None, 0), "unknown"),
    ],
)
def test_changes(figure: Figure, text: str) -> None:
    assert percent(figure) == text


def test_axes_hold_the_intervals_with_distinct_ticks() -> None:
    figures = [Figure(1.0, 1.0, 1.0, 3), Figure(0.99998, 0.99996, 0.99999, 3), Figure(None, None, None, 0)]
    chart = _chart("", "", "intensity", {"": figures}, ["0", "0.5", "1"])
    assert len({text for _, text in chart.levels}) == len(chart.levels)
    ((_, (first, second)),) = chart.lines
    assert first.y == first.low == first.high
    assert second.low is not None
    assert second.high is not None
    # Pixels are counted from the top.
    assert 0 < first.y < second.high < second.y < second.low < PLOT_HEIGHT
    assert [tick for _, tick in chart.ticks] == ["0", "0.5", "1"]

"""The results as one HTML page, with its styles, charts and images embedded.

Its template is `evaluation.html`; the styles are those of the report.
"""

import base64
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sws_export.evaluation.measure import METRICS, Summary
from sws_export.evaluation.metrics import ring_frequencies
from sws_export.evaluation.options import INTENSITIES
from sws_export.evaluation.statistics import Figure
from sws_export.report.templates import environment

PLOT_WIDTH, PLOT_HEIGHT = 440, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 20, 12, 26
_LEVELS = 4
# Lines of a chart are moved apart, so that their intervals do not cover each other.
_APART = 3.0
_TICKS = 6
_SMALLEST_SIDE, _LARGEST_SIDE = 96, 256
_SHOWN_STEPS = (0, 2, 4)
# The largest changes are clipped, so that the others are visible.
_SHOWN_QUANTILE = 0.99


@dataclasses.dataclass(frozen=True)
class Extreme:
    """A pair that is shown.

    Attributes:
        prompt: Its prompt.
        seed: Its seed.
        moved: Difference between the images at intensities 1 and 0.
        images: uint8 [intensities, H, W, C].
    """

    prompt: str
    seed: int
    moved: float
    images: npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Point:
    """A figure in a chart: its place in pixels, the ends of its interval, and its text."""

    x: float
    y: float
    low: float | None
    high: float | None
    text: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines of figures with their intervals.

    Attributes:
        title: Short name.
        meaning: One sentence.
        axis: Title of the horizontal axis.
        lines: Label and points of each.
        levels: Height in pixels and text of each horizontal line.
        ticks: Place in pixels and text of each label of the horizontal axis.
    """

    title: str
    meaning: str
    axis: str
    lines: list[tuple[str, list[Point]]]
    levels: list[tuple[float, str]]
    ticks: list[tuple[float, str]]
    left: int = _LEFT
    right: int = PLOT_WIDTH - _RIGHT


def render(
    document: Mapping[str, Any], summary: Summary, extremes: tuple[list[Extreme], list[Extreme]]
) -> str:
    """The page as text.

    Args:
        document: The content of `evaluation.json`.
        summary: The figures.
        extremes: The pairs that moved most, and least.
    """
    zero = "plain" if document["plain_at_zero"] else "SWS 0"
    template = environment("sws_export.evaluation").get_template("evaluation.html")
    columns = [zero, *(f"SWS {intensity:g}" for intensity in INTENSITIES[1:])]
    return template.render(
        document=document,
        columns=columns,
        rows=_rows(summary),
        charts=[*_metric_charts(summary), *_curves(summary)],
        width=PLOT_WIDTH,
        height=PLOT_HEIGHT,
        extremes=[
            (title, [(each, _images(each)) for each in pairs])
            for title, pairs in zip(("most", "least"), extremes, strict=True)
        ],
    )


def percent(figure: Figure) -> str:
    """A relative change with its interval."""
    if figure.value is None:
        return "unknown"
    if figure.low is None or figure.high is None:
        return f"{figure.value:+.2%}"
    return f"{figure.value:+.2%} ({100 * figure.low:+.2f} to {100 * figure.high:+.2f})"


def number(figure: Figure) -> str:
    """A value with its interval."""
    if figure.value is None:
        return "unknown"
    if figure.low is None or figure.high is None:
        return _digits(figure.value)
    return f"{_digits(figure.value)} ({_digits(figure.low)} to {_digits(figure.high)})"


def _digits(value: float) -> str:
    """Three digits, or five decimals where that is more: SSIM differs from 1 in the fifth."""
    return f"{value:.3g}" if abs(value) < 0.1 or abs(value) >= 10 else f"{value:.5f}".rstrip("0").rstrip(".")


def change_texts(name: str, summary: Summary) -> list[tuple[str, bool]]:
    """What is stated of a metric at each intensity above 0, and whether its interval excludes no change."""
    found = summary.metrics[name]
    comparison = METRICS[name].comparison
    if comparison == "none":
        return [(number(figure), False) for figure in found.values[1:]]
    text = percent if comparison == "relative" else number
    return [(text(figure), figure.is_nonzero) for figure in found.changes[1:]]


def _rows(summary: Summary) -> list[tuple[str, str, list[tuple[str, bool]]]]:
    """Title, plain value and changes of each metric."""
    return [
        (METRICS[name].title, number(found.values[0]), change_texts(name, summary))
        for name, found in summary.metrics.items()
    ]


def _metric_charts(summary: Summary) -> list[Chart]:
    ticks = [f"{intensity:g}" for intensity in INTENSITIES]
    return [
        _chart(METRICS[name].title, METRICS[name].meaning, "intensity", {"": found.values}, ticks)
        for name, found in summary.metrics.items()
    ]


def _curves(summary: Summary) -> list[Chart]:
    frequencies = [f"{frequency:.2f}" for frequency in ring_frequencies()]
    labels = [f"SWS {intensity:g}" for intensity in INTENSITIES]
    charts = [
        _chart(
            "Radial power spectrum",
            "Change of the power of the luminance in rings of equal spatial frequency.",
            "cycles per pixel",
            dict(zip(labels[1:], summary.spectrum[1:], strict=True)),
            _thinned(frequencies),
            percentages=True,
        )
    ]
    if summary.steps[0]:
        shown = {labels[index]: summary.steps[index] for index in _SHOWN_STEPS}
        steps = [str(step + 2) for step in range(len(summary.steps[0]))]
        charts.append(
            _chart(
                "Step-to-step change",
                "Root mean square change of the predicted image since the step before.",
                "step",
                shown,
                _thinned(steps),
            )
        )
    return charts


def _chart(
    title: str,
    meaning: str,
    axis: str,
    series: Mapping[str, Sequence[Figure]],
    ticks: Sequence[str],
    *,
    percentages: bool = False,
) -> Chart:
    ends = [
        end
        for figures in series.values()
        for figure in figures
        for end in (figure.value, figure.low, figure.high)
        if end is not None
    ]
    bottom, top = _range(ends)
    places = np.linspace(_LEFT + 8, PLOT_WIDTH - _RIGHT - 8, len(ticks))
    lines = []
    for line, (label, figures) in enumerate(series.items()):
        shift = _APART * (line - (len(series) - 1) / 2)
        points = []
        for x, figure in zip(places, figures, strict=True):
            if figure.value is None:
                continue
            y, low, high = (
                None if value is None else _place(value, bottom, top)
                for value in (figure.value, figure.low, figure.high)
            )
            assert y is not None
            text = percent(figure) if percentages else number(figure)
            points.append(Point(float(x) + shift, y, low, high, f"{label} {text}".strip()))
        lines.append((label, points))
    levels = [
        (_place(level, bottom, top), f"{level:+.1%}" if percentages else _text(level, top - bottom))
        for level in np.linspace(bottom, top, _LEVELS)
    ]
    named = [(float(x), tick) for x, tick in zip(places, ticks, strict=True)]
    return Chart(title, meaning, axis, lines, levels, named)


def _range(ends: Sequence[float]) -> tuple[float, float]:
    """Lower and upper end of a vertical axis with some space around the values."""
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    space = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - space, high + space


def _text(level: float, span: float) -> str:
    """`level` with the decimals that distinguish the levels of an axis."""
    decimals = max(0, math.ceil(-math.log10(span)) + 1)
    return f"{level:.{decimals}f}" if decimals <= 6 else f"{level:.1e}"


def _place(value: float, bottom: float, top: float) -> float:
    share = (value - bottom) / (top - bottom)
    return float(PLOT_HEIGHT - _BOTTOM - share * (PLOT_HEIGHT - _BOTTOM - _TOP))


def _thinned(ticks: Sequence[str]) -> list[str]:
    """`ticks` with a few labels left."""
    shown = {round(place) for place in np.linspace(0, len(ticks) - 1, min(_TICKS, len(ticks)))}
    return [tick if index in shown else "" for index, tick in enumerate(ticks)]


def _images(extreme: Extreme) -> list[str]:
    """PNG in base64 of the images, and of the change from the first to the last, enlarged."""
    change = extreme.images[-1].astype(np.float32) - extreme.images[0]
    largest = max(float(np.quantile(np.abs(change), _SHOWN_QUANTILE)), 1.0)
    shown = np.clip(127.5 + change * (102.0 / largest), 0, 255).round().astype(np.uint8)
    return [_png(pixels) for pixels in (*extreme.images, shown)]


def _png(pixels: npt.NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
    scale = max(1, _SMALLEST_SIDE // min(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()

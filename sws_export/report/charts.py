"""Charts of a report: heat maps, line charts and images of transports."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from graph_passes.parameters import STATE_RADIUS, diamond_offsets
from sws_export.report.explanation import Floats

# From 0 to the maximum. The page inverts them on a dark background.
_COLOURS = np.array([(247, 244, 238), (238, 196, 128), (201, 92, 62), (74, 24, 64)], np.float64)
_DENSE = 24
"""Heat maps with more rows than this have thin rows."""
_WIDTH, _HEIGHT = 440, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 20, 8, 24


def figure(title: str, meaning: str, content: str, note: str = "") -> str:
    """A card with a title, an explanation and a chart; all of them are HTML."""
    beside = f'<span class="note">{note}</span>' if note else ""
    return (
        f'<figure><figcaption>{beside}<b>{title}</b><span class="meaning">{meaning}</span></figcaption>'
        f'<div class="scroll">{content}</div></figure>'
    )


def heat_map(rows: Mapping[str, Sequence[float]], ticks: Sequence[str], largest: float, unit: str) -> str:
    """A row of coloured cells for each label, with the scale below.

    Args:
        rows: Values by label, one per step.
        ticks: Label of each column.
        largest: Value of the darkest colour; 0 is the lightest.
        unit: Format specification of a value.
    """
    lines = []
    for label, values in rows.items():
        cells = "".join(
            f'<td class="ink" style="background:{_css(value / largest if largest else 0.0)}" '
            f'title="{html.escape(label)}, step {step}: {format(value, unit)}"></td>'
            for step, value in enumerate(values, start=1)
        )
        lines.append(f'<tr><th scope="row">{html.escape(label)}</th>{cells}</tr>')
    axis = "".join(f"<td>{tick}</td>" for tick in ticks)
    lines.append(f'<tr class="axis"><th scope="row">σ</th>{axis}</tr>')
    dense = " dense" if len(rows) > _DENSE else ""
    stops = ", ".join(_css(share) for share in np.linspace(0, 1, 7))
    scale = (
        f'<div class="scale"><span>{format(0.0, unit)}</span><i class="ink" style="background:'
        f'linear-gradient(90deg, {stops})"></i><span>{format(largest, unit)}</span></div>'
    )
    return f'<table class="heat{dense}">{"".join(lines)}</table>{scale}'


def line_chart(series: Mapping[str, Sequence[float]], ticks: Sequence[str], unit: str) -> str:
    """Lines over the steps, from 0 to a round number; several lines have a legend.

    Args:
        series: Values by label, one per step.
        ticks: Label of each step; may be empty.
        unit: Format specification of a value.
    """
    top = _round_up(max(max(values) for values in series.values()))
    count = len(ticks)
    places = np.linspace(_LEFT, _WIDTH - _RIGHT, count)
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = _height(share)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = format(top * share, unit)
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for place, tick in zip(places, ticks, strict=True):
        parts.append(f'<text x="{place:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{tick}</text>')
    for number, (label, values) in enumerate(series.items(), start=1):
        points = [(x, _height(value / top)) for x, value in zip(places, values, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line{number}" points="{path}"/>')
        for step, ((x, y), value) in enumerate(zip(points, values, strict=True), start=1):
            text = f"{html.escape(label)}, step {step}: {format(value, unit)}"
            parts.append(
                f'<circle class="dot{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{text}</title></circle>'
            )
    legend = "".join(
        f'<span><i class="line{number}"></i>{html.escape(label)}</span>'
        for number, label in enumerate(series if len(series) > 1 else (), start=1)
    )
    drawing = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'
    return f'<div class="legend">{legend}</div>{drawing}'


def _height(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)


def _round_up(value: float) -> float:
    """The smallest of 1, 2, 2.5, 4, 5, 8 and 10 times a power of ten that is not below `value`."""
    if value <= 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(power * next(step for step in (1, 2, 2.5, 4, 5, 8, 10) if value <= step * power * 1.0001))


def spread(transport: Floats, row: int, column: int) -> Floats:
    """The transport of one token as a dense map.

    Args:
        transport: Banded, [145, H, W].
        row: Row of the token.
        column: Column of the token.

    Returns:
        Its share at every token, [H, W]; the sum is the row sum of the transport.
    """
    height, width = transport.shape[1:]
    shares = np.zeros((height, width), np.float32)
    for entry, (dy, dx) in enumerate(diamond_offsets(STATE_RADIUS)):
        y, x = row + dy, column + dx
        if 0 <= y < height and 0 <= x < width:
            shares[y, x] = transport[entry, row, column]
    return shares


def picture(shares: Floats, largest: float, label: str) -> str:
    """An image of shares [H, W], one pixel each; `largest` has the darkest colour."""
    image = Image.fromarray(_blend(np.sqrt(shares / max(largest, 1e-12))))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    text = f"{label}: maximum {shares.max():.3g}"
    return f'<img class="ink" src="data:image/png;base64,{data}" alt="{text}" title="{text}">'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of numbers; the first column is text."""
    titles = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="numbers"><tr>{titles}</tr>{body}</table></div>'


def _css(share: float) -> str:
    red, green, blue = _blend(np.array([share]))[0]
    return f"rgb({red},{green},{blue})"


def _blend(shares: Floats) -> npt.NDArray[np.uint8]:
    """Colours [..., 3] of shares in [0, 1]."""
    places = np.linspace(0.0, 1.0, len(_COLOURS))
    channels = [np.interp(shares, places, _COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)

"""Charts of a report: heat maps, line charts and images of transports."""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from graph_passes.parameters import STATE_RADIUS, diamond_offsets
from sws_export.report.explanation import Floats
from sws_export.report.templates import MACROS

# From 0 to the maximum. The page inverts them on a dark background.
_COLOURS = np.array([(247, 244, 238), (238, 196, 128), (201, 92, 62), (74, 24, 64)], np.float64)
_DENSE = 24
"""Heat maps with more rows than this have thin rows."""
_WIDTH, _HEIGHT = 440, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 20, 8, 24


def figure(title: str, meaning: str, content: Markup, note: str = "") -> Markup:
    """A card with a title, an explanation and a chart."""
    return MACROS.figure(title, meaning, content, note)


def heat_map(rows: Mapping[str, Sequence[float]], ticks: Sequence[str], largest: float, unit: str) -> Markup:
    """A row of coloured cells for each label, with the scale below.

    Args:
        rows: Values by label, one per step.
        ticks: Label of each column.
        largest: Value of the darkest colour; 0 is the lightest.
        unit: Format specification of a value.
    """
    cells = [
        (label, [(_css(value / largest if largest else 0.0), format(value, unit)) for value in values])
        for label, values in rows.items()
    ]
    stops = [_css(share) for share in np.linspace(0, 1, 7)]
    return MACROS.heat_map(cells, ticks, stops, format(0.0, unit), format(largest, unit), len(rows) > _DENSE)


def line_chart(series: Mapping[str, Sequence[float]], ticks: Sequence[str], unit: str) -> Markup:
    """Lines over the steps, from 0 to a round number; several lines have a legend.

    Args:
        series: Values by label, one per step.
        ticks: Label of each step; may be empty.
        unit: Format specification of a value.
    """
    top = _round_up(max(max(values) for values in series.values()))
    places = [float(place) for place in np.linspace(_LEFT, _WIDTH - _RIGHT, len(ticks))]
    levels = [(_height(share), format(top * share, unit)) for share in (0.0, 0.5, 1.0)]
    lines = [
        (
            label,
            [(x, _height(value / top), format(value, unit)) for x, value in zip(places, values, strict=True)],
        )
        for label, values in series.items()
    ]
    named = list(zip(places, ticks, strict=True))
    return MACROS.line_chart(_WIDTH, _HEIGHT, _LEFT, _WIDTH - _RIGHT, levels, named, lines)


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


def picture(shares: Floats, largest: float, label: str) -> Markup:
    """An image of shares [H, W], one pixel each; `largest` has the darkest colour."""
    image = Image.fromarray(_blend(np.sqrt(shares / max(largest, 1e-12))))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return MACROS.picture(data, f"{label}: maximum {shares.max():.3g}")


def _css(share: float) -> str:
    red, green, blue = _blend(np.array([share]))[0]
    return f"rgb({red},{green},{blue})"


def _blend(shares: Floats) -> npt.NDArray[np.uint8]:
    """Colours [..., 3] of shares in [0, 1]."""
    places = np.linspace(0.0, 1.0, len(_COLOURS))
    channels = [np.interp(shares, places, _COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)

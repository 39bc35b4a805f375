"""A sheet of labelled images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 12
_GAP = 4
_GROUP_GAP = 14
_LABEL_WIDTH = 150
_LINE = 18
_PAPER, _INK, _FAINT = (250, 250, 248), (30, 30, 34), (110, 110, 116)


def draw_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    columns: Sequence[str],
    groups: Sequence[str],
    title: str,
    notes: Sequence[str] = (),
) -> Image.Image:
    """Draw images of equal size in labelled rows, with the columns in groups.

    Args:
        rows: Label and images of each row; the number of images is groups times columns.
        columns: Labels of the columns of one group.
        groups: Labels of the groups.
        title: Line at the top.
        notes: Lines at the bottom.
    """
    width, height = rows[0][1][0].size
    lefts = _lefts(width, len(columns), len(groups))
    small, large = ImageFont.load_default(13), ImageFont.load_default(15)
    heads = [_wrapped(label, small, width) for label in columns]
    top = _MARGIN + (2 + max(head.count("\n") + 1 for head in heads)) * _LINE + 8
    bottom = top + len(rows) * (height + _GAP) - _GAP + _MARGIN
    texts = [int(font.getlength(text)) for text, font in ((title, large), *((note, small) for note in notes))]
    sheet = Image.new(
        "RGB",
        (
            max(lefts[-1] + width, _MARGIN + max(texts)) + _MARGIN,
            bottom + (len(notes) * _LINE + _MARGIN if notes else 0),
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 2), title, _INK, large)
    for number, left in enumerate(lefts):
        if number % len(columns) == 0:
            draw.text((left, _MARGIN + _LINE + 4), groups[number // len(columns)], _INK, small)
        place = (left, _MARGIN + 2 * _LINE + 4)
        draw.multiline_text(place, heads[number % len(columns)], _FAINT, small, spacing=_LINE - 13)
    for row, (label, images) in enumerate(rows):
        y = top + row * (height + _GAP)
        text = _wrapped(label, small, _LABEL_WIDTH - 10)
        draw.multiline_text((_MARGIN, y + height // 2), text, _INK, small, anchor="lm", spacing=3)
        for left, image in zip(lefts, images, strict=True):
            sheet.paste(image, (left, y))
    for number, note in enumerate(notes):
        draw.text((_MARGIN, bottom + number * _LINE), note, _INK, small)
    return sheet


def to_image(values: npt.NDArray[np.floating], scale: int = 1) -> Image.Image:
    """RGB image of values [3, H, W] in [-1, 1], each pixel repeated `scale` by `scale` times."""
    pixels = np.clip((values.transpose(1, 2, 0) + 1.0) * 127.5, 0.0, 255.0).round().astype(np.uint8)
    image = Image.fromarray(pixels)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def save_image(image: Image.Image, path: Path) -> None:
    """Write `image` as PNG, atomically.

    Raises:
        OutputError: The directory is missing or not writable, or the disk is full.
    """
    from sws_export.files import publish, staged_directory

    with staged_directory(path) as scratch:
        image.save(scratch / path.name, format="PNG")
        publish(scratch / path.name, path)


def _lefts(width: int, columns: int, groups: int) -> list[int]:
    step = width + _GAP
    group = columns * step - _GAP + _GROUP_GAP
    start = _MARGIN + _LABEL_WIDTH
    return [start + g * group + c * step for g in range(groups) for c in range(columns)]


def _wrapped(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`label`, wrapped to `width` pixels; words that are wider, such as names of files, are broken."""
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for character in word:
            if font.getlength(lines[-1] + character) > width and lines[-1]:
                lines.append("")
            lines[-1] += character
    return "\n".join(lines)

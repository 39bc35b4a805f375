"""What is measured of sampled images, and the sheet that shows them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sws_export.errors import OutputError
from sws_export.sampling.effects import Sampled, measure, sharpness
from sws_export.sampling.image_grid import draw_grid, save_image, to_image


def test_what_is_measured() -> None:
    plain = Sampled(0.0, np.zeros((2, 1, 4, 4), np.float32), np.zeros((1, 2), np.float32))
    moved = np.zeros((2, 1, 4, 4), np.float32)
    moved[0] = 0.5
    effect = measure(Sampled(0.7, moved, np.full((1, 2), 0.25, np.float32)), plain)
    assert (effect.intensity, effect.difference, effect.sharpness, effect.step_change) == (
        0.7,
        0.25,
        0.0,
        0.25,
    )
    for changes in (None, np.zeros((0, 2), np.float32)):
        assert measure(Sampled(0.7, moved, changes), plain).step_change is None


def test_sharpness_of_a_ramp_is_its_slope() -> None:
    ramp = np.tile(np.arange(6, dtype=np.float32) * 0.3, (1, 1, 5, 1))
    assert sharpness(ramp) == pytest.approx(0.3)
    assert sharpness(ramp + np.swapaxes(np.tile(np.arange(5) * 0.4, (1, 1, 6, 1)), 2, 3)) == pytest.approx(
        0.5
    )


def test_a_image_keeps_its_pixels() -> None:
    values = np.array([[[-1.0, 1.0]], [[0.0, 0.0]], [[1.0, 3.0]]])
    image = to_image(values, 2)
    assert image.size == (4, 2)
    assert [image.getpixel(place) for place in ((0, 0), (1, 1), (2, 0))] == [
        (0, 128, 255),
        (0, 128, 255),
        (255, 128, 255),
    ]


def test_a_sheet_shows_every_image_once() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    images = [Image.new("RGB", (10, 20), colour) for colour in colours]
    rows = [("a long label that needs more than one line", images), ("b", images)]
    sheet = draw_grid(rows, ["x", "y"], ["one", "two"], "title")
    counts = {colour: count for count, colour in sheet.getcolors(1 << 20) or []}
    assert [counts[colour] for colour in colours] == [2 * 10 * 20] * 4
    noted = draw_grid(rows, ["x", "y"], ["one", "two"], "title", ["a note " * 20, "another"])
    assert noted.height > sheet.height
    assert noted.width > sheet.width


def test_labels_of_columns_stay_above_their_column() -> None:
    rows = [("a cat", [Image.new("RGB", (60, 10))] * 2)]
    short, long = (draw_grid(rows, [label] * 2, ["seed 0"], "-") for label in ("x", "unet-int8.onnx SWS 0.5"))
    assert long.height > short.height
    # Between the columns of labels: only the background.
    gap = long.crop((12 + 150 + 60, 12 + 2 * 18, 12 + 150 + 60 + 4, long.height))
    assert [colour for _, colour in gap.getcolors() or []] == [(250, 250, 248)]


def test_a_sheet_is_written_whole_or_not(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 3), (1, 2, 3))
    save_image(image, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as written:
        assert written.getpixel((0, 0)) == (1, 2, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]
    with pytest.raises(OutputError):
        save_image(image, tmp_path / "missing" / "x.png")

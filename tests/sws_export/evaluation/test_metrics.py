"""Metrics on images whose values are known."""

from typing import Any

import numpy as np
import pytest
from skimage.filters import gaussian

from sws_export.evaluation import metrics

RANDOM = np.random.default_rng(5)


def stripes(period: int, side: int = 64) -> Any:
    """Grey vertical stripes, a sine of amplitude 0.25, [side, side, 3]."""
    row = 0.5 + 0.25 * np.sin(2 * np.pi * np.arange(side) / period)
    return np.broadcast_to(row[None, :, None], (side, side, 3)).astype(np.float32)


def blurred(image: Any) -> Any:
    return gaussian(image, sigma=1.0, channel_axis=-1)


@pytest.mark.parametrize("metric", [metrics.laplacian_variance, metrics.gradient_energy])
def test_a_blurred_image_is_less_sharp(metric: Any) -> None:
    image = RANDOM.random((32, 32, 3)).astype(np.float32)
    assert metric(blurred(image)) < 0.2 * metric(image)
    assert metric(np.full((32, 32, 3), 0.3, np.float32)) == pytest.approx(0.0, abs=1e-12)


def test_sharpness_of_known_images() -> None:
    ramp = np.broadcast_to(0.01 * np.arange(20)[None, :, None], (10, 20, 1))
    assert metrics.gradient_energy(ramp) == pytest.approx(0.01**2)
    checks = (np.indices((16, 16)).sum(axis=0) % 2)[..., None] * 0.1
    # Each pixel differs from its four neighbours by 0.1: +-0.4, but at the borders.
    assert metrics.laplacian_variance(checks) == pytest.approx(0.4**2, rel=0.15)


def test_luminance_weighs_green_most() -> None:
    colours = np.eye(3, dtype=np.float32)[:, None, :]
    assert metrics.luminance(colours).ravel() == pytest.approx([0.2125, 0.7154, 0.0721])


@pytest.mark.parametrize(("period", "ring"), [(32, 1), (8, 4), (4, 8), (2.5, 13)])
def test_stripes_have_their_power_in_their_ring(period: float, ring: int) -> None:
    spectrum = metrics.radial_power_spectrum(stripes(period))  # type: ignore[arg-type]
    assert int(spectrum.argmax()) == ring - 1
    assert metrics.ring_frequencies()[ring - 1] == pytest.approx(1 / period, abs=1 / 64)


def test_the_spectrum_of_white_noise_is_its_variance() -> None:
    noise = RANDOM.normal(0.5, 0.1, (128, 96, 1))
    spectrum = metrics.radial_power_spectrum(noise)
    assert spectrum.shape == (metrics.RINGS,)
    assert spectrum[2:] == pytest.approx(np.full(14, 0.1**2), rel=0.25)
    small = metrics.radial_power_spectrum(noise[:16, :16])
    assert np.isnan(small[0])
    assert not np.isnan(small[1])


def test_structure() -> None:
    image = gaussian(RANDOM.random((64, 96, 3)), sigma=3, channel_axis=-1)
    noise = RANDOM.normal(0, 0.05, image.shape)
    assert metrics.structure(image, image) == pytest.approx(1.0)
    # Fine noise is below the low-pass, a shift by a quarter is not.
    assert metrics.structure(image + noise, image) > 0.97
    assert metrics.structure(np.roll(image, 16, axis=0), image) < 0.9
    assert np.isnan(metrics.structure(image[:8], image[:8]))


def test_difference() -> None:
    black, grey = np.zeros((4, 4, 3)), np.full((4, 4, 3), 0.25)
    assert metrics.difference(grey, black) == 0.25
    assert metrics.difference(grey, grey) == 0.0


def test_flicker_counts_what_does_not_move() -> None:
    texture = gaussian(RANDOM.random((32, 32, 3)), sigma=1.5, channel_axis=-1)
    constant = np.stack([texture] * 3)
    still = metrics.still_pixels(constant)
    assert still.all()
    assert metrics.flicker(constant, still) == 0.0
    # Brighter by 0.02 and darker again, nothing moves.
    pulsing = constant + np.array([0.0, 0.02, 0.0])[:, None, None, None]
    assert metrics.flicker(pulsing, still) == pytest.approx(0.02)
    # The texture moves by two pixels: little of it is still.
    contrast = (texture - texture.min()) / np.ptp(texture)
    assert metrics.still_pixels(np.stack([contrast, np.roll(contrast, 2, axis=1)])).mean() < 0.2
    assert np.isnan(metrics.flicker(pulsing, np.zeros_like(still)))

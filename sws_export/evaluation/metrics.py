"""Metrics of images.

An image is float32 [H, W, C] in [0, 1]: RGB with C = 3, or one channel. Metrics of one channel take the
luminance.
"""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
from skimage.color import rgb2gray
from skimage.filters import gaussian, laplace, window
from skimage.metrics import structural_similarity
from skimage.registration import optical_flow_tvl1

ImageArray = npt.NDArray[np.floating[Any]]
Floats = npt.NDArray[np.float64]

RINGS = 16
"""Rings of the radial power spectrum."""
LAYOUT_SIDE = 32
"""Samples along the short side of an image after the low-pass of `structure`."""
STILL_PIXELS = 0.5
"""Motion in pixels below which a pixel counts as still: it stays the same pixel."""

# SSIM as published: a Gaussian window of standard deviation 1.5, truncated to 11 x 11, biased covariances.
_SSIM = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
_SSIM_WINDOW = 11


def luminance(image: ImageArray) -> Floats:
    """Luminance [H, W]: 0.2125 R + 0.7154 G + 0.0721 B, or the channel of an image with one."""
    grey = rgb2gray(image) if image.shape[-1] == 3 else image.mean(axis=-1)
    return np.asarray(grey, np.float64)


def laplacian_variance(image: ImageArray) -> float:
    """Variance of the 3 x 3 Laplacian of the luminance: the larger, the more fine detail.

    LAP4 of Pertuz, Puig and Garcia, "Analysis of focus measure operators for shape-from-focus", 2013.
    """
    return float(laplace(luminance(image)).var())


def gradient_energy(image: ImageArray) -> float:
    """Mean over pixels of the squared differences of the luminance to the right and the lower neighbour.

    GRA1 (energy of the gradient) of Pertuz, Puig and Garcia, 2013.
    """
    grey = luminance(image)
    right, down = np.diff(grey, axis=1)[:-1], np.diff(grey, axis=0)[:, :-1]
    return float((right**2 + down**2).mean())


def ring_frequencies() -> Floats:
    """Centre of each ring of `radial_power_spectrum` in cycles per pixel, [RINGS]; the last is 0.5."""
    return np.arange(1, RINGS + 1) / (2 * RINGS)


def radial_power_spectrum(image: ImageArray) -> Floats:
    """Mean power of the luminance in rings of equal spatial frequency, [RINGS].

    The periodogram |F|² / sum w² of the luminance without its mean, under a Hann window w; frequencies that
    are nearer to 0, or to more than 0.5 cycles per pixel, than to a ring are left out. A ring without any
    frequency, of an image of fewer than 32 pixels, is NaN.
    """
    grey = luminance(image)
    weights = window("hann", grey.shape)
    power = np.abs(np.fft.fft2((grey - grey.mean()) * weights)) ** 2 / np.square(weights).sum()
    down, right = (np.fft.fftfreq(side) for side in grey.shape)
    ring = np.rint(np.hypot(down[:, None], right[None, :]) * 2 * RINGS).astype(int).ravel()
    counts = np.bincount(ring, minlength=RINGS + 1)[1 : RINGS + 1]
    sums = np.bincount(ring, power.ravel(), minlength=RINGS + 1)[1 : RINGS + 1]
    means: Floats = np.divide(sums, counts, out=np.full(RINGS, np.nan), where=counts > 0)
    return means


def structure(image: ImageArray, plain: ImageArray) -> float:
    """SSIM of two images after a low-pass, over all channels: 1 where large forms and colours are the same.

    The low-pass is a Gaussian whose standard deviation is 1/32 of the short side, after which every such
    distance is sampled once, so that images of all sizes are compared at the same share of their size.
    SSIM: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment", 2004, equation 13. NaN for images
    with a side of fewer than 11 pixels, the window of SSIM.
    """
    small, reference = _low_passed(image), _low_passed(plain)
    if min(small.shape[:2]) < _SSIM_WINDOW:
        return float("nan")
    return float(structural_similarity(small, reference, data_range=1.0, channel_axis=-1, **_SSIM))


def difference(image: ImageArray, plain: ImageArray) -> float:
    """Root mean square difference over all pixels and channels."""
    return float(np.sqrt(np.square(image.astype(np.float64) - plain).mean()))


def still_pixels(frames: ImageArray) -> npt.NDArray[np.bool_]:
    """Where nothing moves from one frame to the next.

    The optical flow is TV-L1: Zach, Pock and Bischof, "A duality based approach for realtime TV-L1 optical
    flow", 2007.

    Args:
        frames: Images [F, H, W, C].

    Returns:
        [F - 1, H, W], True where the flow is shorter than `STILL_PIXELS`.
    """
    grey = [luminance(frame) for frame in frames]
    flows = [optical_flow_tvl1(before, after, dtype=np.float64) for before, after in itertools.pairwise(grey)]
    return np.stack([np.hypot(*flow) < STILL_PIXELS for flow in flows])


def flicker(frames: ImageArray, still: npt.NDArray[np.bool_]) -> float:
    """Mean absolute difference of consecutive frames where nothing moves.

    The warping error of Lai et al., "Learning blind video temporal consistency", 2018, equation 12, with the
    absolute difference, and where the flow is zero, so that no frame has to be warped.

    Args:
        frames: Images [F, H, W, C].
        still: [F - 1, H, W], see `still_pixels`.

    Returns:
        NaN if no pixel is still.
    """
    changes = np.abs(np.diff(frames.astype(np.float64), axis=0)).mean(axis=-1)
    return float(changes[still].mean()) if still.any() else float("nan")


def _low_passed(image: ImageArray) -> ImageArray:
    spread = min(image.shape[:2]) / LAYOUT_SIDE
    smooth = gaussian(image, sigma=spread, channel_axis=-1)
    step = max(1, int(spread))
    sampled: ImageArray = smooth[step // 2 :: step, step // 2 :: step]
    return sampled

"""Metrics of the images of each pair, and of all pairs together."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sws_export.evaluation import metrics
from sws_export.evaluation.adherence import Scorer
from sws_export.evaluation.options import INTENSITIES
from sws_export.evaluation.pairs import PairImages
from sws_export.evaluation.statistics import Figure, mean, mean_difference, relative_change

Floats = npt.NDArray[np.float64]
Comparison = Literal["relative", "difference", "none"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a metric means.

    Attributes:
        title: Short name.
        meaning: One sentence.
        comparison: How images with SWS are compared with the plain ones: by the relative change of the
            mean, by the difference of the means, or not, for a metric that compares by itself.
    """

    title: str
    meaning: str
    comparison: Comparison = "relative"


METRICS: Mapping[str, Metric] = {
    "laplacian_variance": Metric(
        "Sharpness: variance of the Laplacian", "Fine detail of the luminance; larger is sharper."
    ),
    "gradient_energy": Metric(
        "Sharpness: gradient energy",
        "Mean squared difference of the luminance between neighbouring pixels; larger is sharper.",
    ),
    "structure": Metric(
        "Structure: SSIM after a low-pass",
        "Large forms and colours, compared with the plain image; 1 is the same.",
        "none",
    ),
    "difference": Metric(
        "Difference",
        "Root mean square difference from the plain image, of values in [0, 1].",
        "none",
    ),
    "step_change": Metric(
        "Step-to-step change",
        "Root mean square change of the predicted image from one step to the next, in latents, mean of all "
        "steps.",
    ),
    "flicker": Metric(
        "Frame-to-frame flicker",
        "Mean absolute difference of consecutive frames of a slow walk through the noise, where the plain "
        "frames do not move.",
    ),
    "clip_score": Metric(
        "Prompt adherence: CLIP score", "100 times the cosine of image and prompt.", "difference"
    ),
    "check": Metric(
        "Prompt adherence: the pipeline's check.py", "Share of the prompt that the image shows.", "difference"
    ),
}


@dataclasses.dataclass(frozen=True)
class PairMetrics:
    """Metrics of a pair.

    Attributes:
        values: Of each intensity, by the names of `METRICS`; NaN where a metric has no value.
        spectrum: Radial power spectrum, [intensities, rings].
        changes: Change of the predicted image, [intensities, steps - 1].
    """

    values: Mapping[str, Floats]
    spectrum: Floats
    changes: Floats


def measure_pair(found: PairImages, prompt: str, scorers: Mapping[str, Scorer]) -> PairMetrics:
    """Metrics of the first frame of each intensity, and the flicker of its frames.

    Args:
        found: The images.
        prompt: The prompt.
        scorers: Measures of prompt adherence, by the names of `METRICS`.
    """
    frames = found.images.astype(np.float32) / np.float32(255.0)
    first, plain = frames[:, 0], frames[0, 0]
    values = {
        "laplacian_variance": [metrics.laplacian_variance(image) for image in first],
        "gradient_energy": [metrics.gradient_energy(image) for image in first],
        "structure": [metrics.structure(image, plain) for image in first],
        "difference": [metrics.difference(image, plain) for image in first],
    }
    if found.changes.size:
        values["step_change"] = [float(changes.mean()) for changes in found.changes]
    if frames.shape[1] > 1:
        still = metrics.still_pixels(frames[0])
        values["flicker"] = [metrics.flicker(walk, still) for walk in frames]
    for name, scorer in scorers.items():
        values[name] = [scorer(prompt, image) for image in first]
    return PairMetrics(
        {name: np.asarray(each, np.float64) for name, each in values.items()},
        np.stack([metrics.radial_power_spectrum(image) for image in first]),
        found.changes.astype(np.float64),
    )


@dataclasses.dataclass(frozen=True)
class MetricSummary:
    """A metric over all pairs, one figure for each intensity.

    Attributes:
        values: Means.
        changes: Compared with the plain images by `Metric.comparison`; empty for `none`.
    """

    values: tuple[Figure, ...]
    changes: tuple[Figure, ...]


@dataclasses.dataclass(frozen=True)
class Summary:
    """All metrics over all pairs.

    Attributes:
        metrics: By the names of `METRICS`, without those that were not measured.
        spectrum: Relative change of the power in each ring, by intensity.
        steps: Change of the predicted image after each step but the first, by intensity.
    """

    metrics: Mapping[str, MetricSummary]
    spectrum: tuple[tuple[Figure, ...], ...]
    steps: tuple[tuple[Figure, ...], ...]


def summarize(pairs: Sequence[PairMetrics]) -> Summary:
    """Means and changes of all pairs."""
    summaries = {}
    for name in pairs[0].values:
        values = np.stack([pair.values[name] for pair in pairs])
        summaries[name] = summarize_metric(values, METRICS[name].comparison)
    spectra = np.stack([pair.spectrum for pair in pairs])
    changes = np.stack([pair.changes for pair in pairs])
    return Summary(
        summaries,
        tuple(
            tuple(
                relative_change(spectra[:, index, ring], spectra[:, 0, ring])
                for ring in range(spectra.shape[2])
            )
            for index in range(len(INTENSITIES))
        ),
        tuple(
            tuple(mean(changes[:, index, step]) for step in range(changes.shape[2]))
            for index in range(len(INTENSITIES))
        ),
    )


def summarize_metric(values: Floats, comparison: Comparison) -> MetricSummary:
    """One metric; `values` are [pairs, intensities], the first intensity is plain."""
    compare: Any = {"relative": relative_change, "difference": mean_difference}.get(comparison)
    columns = values.T
    return MetricSummary(
        tuple(mean(column) for column in columns),
        tuple(compare(column, columns[0]) for column in columns) if compare else (),
    )

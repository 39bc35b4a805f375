"""The data of a report."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sws_export.manifest import Manifest

Floats = npt.NDArray[np.floating[Any]]


@dataclasses.dataclass(frozen=True)
class SiteMetrics:
    """Metrics of one site at one step; entropies and KL divergence in nats.

    Attributes:
        alpha_k: Share of the transported keys.
        a_v: Share of the transported values.
        entropy_mean: Mean entropy of the rows of plain attention, over heads and rows.
        entropy_min: Smallest entropy of a row.
        entropy_max: Largest entropy of a row.
        kl: KL divergence from plain attention at `alpha_k`.
    """

    alpha_k: float
    a_v: float
    entropy_mean: float
    entropy_min: float
    entropy_max: float
    kl: float

    @property
    def uncertainty(self) -> float:
        """Position of the mean entropy between the smallest and the largest, in [0, 1]."""
        span = max(self.entropy_max - self.entropy_min, 1e-6)
        return float(np.clip((self.entropy_mean - self.entropy_min) / span, 0.0, 1.0))


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """One step of the first sample of the batch.

    Attributes:
        sigma: Noise level.
        progress: u in [0, 1]; the remaining noise with the preset `comfyui-node`.
        kl_cap: Budget of the KL divergence in nats.
        seconds: Wall time of the artefact.
        effect: Root mean square change of the prediction by SWS, relative to that of the prediction.
        error: Largest difference from the reference, relative to the largest value; None if it was not
            compared.
        sites: Metrics by the path of the attention module.
        states: Transport by the name of the state, [145, H, W]; entry j at (y, x) is the share of token
            (y, x) at (y, x) + `diamond_offsets(8)[j]`.
    """

    sigma: float
    progress: float
    kl_cap: float
    seconds: float
    effect: float
    error: float | None
    sites: Mapping[str, SiteMetrics]
    states: Mapping[str, Floats]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A sampling run with the metrics of its steps.

    Attributes:
        manifest: Of the artefact.
        artefact: Its file name.
        intensity: Strength of SWS.
        sizes: batch, height, width (latent) and tokens.
        text: Description of the text embeddings.
        metrics_source: `artefact` if it has debug outputs, otherwise `reference`.
        tokens: Positions (down, right) in [0, 1] of the tokens whose transport is drawn, by their labels.
        steps: First to last.
    """

    manifest: Manifest
    artefact: str
    intensity: float
    sizes: Mapping[str, int]
    text: str
    metrics_source: str
    tokens: Mapping[str, tuple[float, float]]
    steps: tuple[StepMetrics, ...]

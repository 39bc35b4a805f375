"""What a report knows of a sampling run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


@dataclasses.dataclass(frozen=True)
class SiteMetrics:
    """One site at one step; entropies and KL divergence in nats.

    Attributes:
        alpha_k: Share of the transported keys.
        a_v: Share of the transported values.
        entropy_mean: Of the rows of plain attention, over heads and rows.
        entropy_min: The lowest of them.
        entropy_max: The highest of them.
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
        """Place of the mean entropy between the lowest and the highest, in [0, 1]."""
        span = max(self.entropy_max - self.entropy_min, 1e-6)
        return float(np.clip((self.entropy_mean - self.entropy_min) / span, 0.0, 1.0))


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """One step of the first sample of the batch.

    Attributes:
        sigma: Noise level.
        progress: u in [0, 1]; with the preset `node` it is the remaining noise.
        kl_cap: Budget of the KL divergence in nats.
        seconds: Wall time of the artefact.
        effect: Root mean square of what SWS changes in the prediction, relative to the prediction's.
        error: Largest difference of the artefact to the reference, relative to the largest value; None
            where it was not compared.
        sites: Figures by the path of the attention module.
        states: Transports by the name of the state, [145, H, W], entry j of token (y, x) its share at
            (y, x) + `diamond_offsets(8)[j]`.
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
    """A sampling run looked into.

    Attributes:
        manifest: Of the artefact.
        artefact: Its name.
        intensity: Strength of SWS.
        sizes: batch, height, width (latent) and tokens.
        text: What the text embeddings were, in words.
        told_by: `artefact` where it gives out the figures of its sites, else `reference`.
        tokens: Places of the picture whose transport is drawn, (down, right) in [0, 1], by their names.
        steps: First to last.
    """

    manifest: Mapping[str, Any]
    artefact: str
    intensity: float
    sizes: Mapping[str, int]
    text: str
    told_by: str
    tokens: Mapping[str, tuple[float, float]]
    steps: tuple[StepMetrics, ...]

"""A short sampling run to compare two implementations on: inputs of a UNet at falling noise levels."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sws_export.tensors import TensorSpec, concrete_shape

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]

_HIGHEST_SIGMA = 14.0
_LOWEST_SIGMA = 0.3
_MEMBER_RATIO = 0.8
"""Noise level of each batch member against the one before, so that no two see the same u."""


@dataclasses.dataclass(frozen=True)
class TrajectoryStep:
    """Noise levels of one step, [B], and of the step that follows."""

    sigma: Floats
    next_sigma: Floats


class Trajectory:
    """Inputs that a sampler would feed: Euler steps from noise, every batch member on its own.

    Members differ in noise level, intensity, text and latent. The latent moves by the reference's
    predictions, so that two implementations see the same inputs at every step.
    """

    def __init__(self, inputs: Sequence[TensorSpec], sizes: Mapping[str, int], steps: int, seed: int = 0):
        self._inputs = inputs
        self._sizes = sizes
        self._random = np.random.default_rng(seed)
        batch = sizes["batch"]
        members = _MEMBER_RATIO ** np.arange(batch)
        levels = np.geomspace(_HIGHEST_SIGMA, _LOWEST_SIGMA, steps + 1)
        self._sigmas = levels[:, None] * members[None, :]
        self.intensity = np.linspace(1.0, 0.5, batch)
        self._conditions = {
            spec.name: self._condition(spec) for spec in inputs if spec.name not in ("sample", "timestep")
        }
        sample = next(spec for spec in inputs if spec.name == "sample")
        noise = self._random.standard_normal(concrete_shape(sample, sizes))
        self._latent = noise * self._sigmas[0][:, None, None, None]

    def steps(self) -> Iterator[TrajectoryStep]:
        """The noise levels of each step, highest first."""
        for sigma, next_sigma in zip(self._sigmas, self._sigmas[1:], strict=False):
            yield TrajectoryStep(sigma, next_sigma)

    def inputs(self, step: TrajectoryStep) -> dict[str, Array]:
        """The UNet's inputs at `step` in float64 (class labels in int64), without SWS's own."""
        scaled = self._latent / np.sqrt(step.sigma**2 + 1.0)[:, None, None, None]
        return {"sample": scaled, "timestep": timestep_of(step.sigma), **self._conditions}

    def advance(self, step: TrajectoryStep, prediction: Floats) -> None:
        """Move the latent to the next noise level along `prediction`, taken as noise."""
        change = (step.next_sigma - step.sigma)[:, None, None, None]
        # Inpainting UNets take more channels than they predict; the rest is a condition and stays.
        predicted = prediction.shape[1]
        self._latent[:, :predicted] += change * prediction

    def _condition(self, spec: TensorSpec) -> Array:
        shape = concrete_shape(spec, self._sizes)
        if spec.dtype == "int64":
            return np.zeros(shape, np.int64)
        if spec.name == "time_ids":
            # Sizes and offsets of a picture, as SDXL is trained with.
            return np.resize(np.array([64.0, 48.0, 0.0, 0.0, 64.0, 48.0]), shape)
        return self._random.standard_normal(shape)


def timestep_of(sigma: Floats) -> Floats:
    """Timesteps, fractional, at which Stable Diffusion's noise schedule reaches the levels `sigma`.

    The schedule is the scaled-linear one of 1000 steps from beta 0.00085 to 0.012.
    """
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1.0 - betas)
    levels = np.sqrt((1.0 - kept) / kept)
    return np.asarray(np.interp(np.log(sigma), np.log(levels), np.arange(1000)), np.float64)

"""A short sampling run on which two implementations are compared: UNet inputs at decreasing noise levels."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sws_export.noise_levels import stable_diffusion_levels
from sws_export.tensors import TensorSpec, concrete_shape

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]

_HIGHEST_SIGMA = 14.0
_LOWEST_SIGMA = 0.3
_SAMPLE_RATIO = 0.8
"""Ratio of the noise levels of consecutive samples of the batch, so that no two samples have the same u."""


@dataclasses.dataclass(frozen=True)
class TrajectoryStep:
    """Noise levels of one step and of the next one, each [B]."""

    sigma: Floats
    next_sigma: Floats


class Trajectory:
    """UNet inputs of Euler steps that start from noise.

    The samples of the batch differ in noise level, intensity, text embedding and latent. The latent is
    updated with the predictions of the reference, so that two implementations get the same inputs at every
    step.
    """

    def __init__(self, inputs: Sequence[TensorSpec], sizes: Mapping[str, int], steps: int, seed: int = 0):
        self._inputs = inputs
        self._sizes = sizes
        self._random = np.random.default_rng(seed)
        batch = sizes["batch"]
        ratios = _SAMPLE_RATIO ** np.arange(batch)
        levels = np.geomspace(_HIGHEST_SIGMA, _LOWEST_SIGMA, steps + 1)
        self._sigmas = levels[:, None] * ratios[None, :]
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
        """Inputs of the UNet at `step` in float64 (class labels in int64), without the inputs of SWS."""
        scaled = self._latent / np.sqrt(step.sigma**2 + 1.0)[:, None, None, None]
        return {"sample": scaled, "timestep": timestep_of(step.sigma), **self._conditions}

    def advance(self, step: TrajectoryStep, prediction: Floats) -> None:
        """Take an Euler step to the next noise level, with `prediction` as the predicted noise."""
        change = (step.next_sigma - step.sigma)[:, None, None, None]
        # Inpainting UNets have more input than output channels; the further ones are a condition.
        predicted = prediction.shape[1]
        self._latent[:, :predicted] += change * prediction

    def _condition(self, spec: TensorSpec) -> Array:
        shape = concrete_shape(spec, self._sizes)
        if spec.dtype == "int64":
            return np.zeros(shape, np.int64)
        if spec.name == "time_ids":
            # Original size, crop offset and target size of an image, the conditioning of SDXL.
            return np.resize(np.array([64.0, 48.0, 0.0, 0.0, 64.0, 48.0]), shape)
        return self._random.standard_normal(shape)


def timestep_of(sigma: Floats) -> Floats:
    """Fractional timesteps at which the noise schedule of Stable Diffusion has the levels `sigma`."""
    levels = stable_diffusion_levels()
    return np.asarray(np.interp(np.log(sigma), np.log(levels), np.arange(len(levels))), np.float64)

"""The noise level that a timestep of a diffusers scheduler stands for."""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Zero terminal SNR keeps nothing of the picture at the last timestep: diffusers' Euler scheduler takes this
# share in its place, so that the noise level is finite (rescale_betas_zero_snr in scheduling_euler_discrete).
_LEAST_KEPT = 2.0**-24


def stable_diffusion_levels() -> Floats:
    """Noise level of each of the 1000 training timesteps of Stable Diffusion 1, 2 and XL."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return levels_of(np.cumprod(1.0 - betas))


def levels_of(kept: Any) -> Floats:
    """sigma = sqrt((1 - a) / a) for each cumulated alpha a, the variance that is kept of the picture."""
    share = np.clip(np.asarray(kept, np.float64), _LEAST_KEPT, 1.0)
    return np.asarray(np.sqrt((1.0 - share) / share), np.float64)


def noise_levels(scheduler: Any, timestep: Any) -> Floats:
    """Noise level of `timestep`, of its shape.

    Timesteps that count training steps, fractional ones too, are looked up in the schedule the model was
    trained with, log sigma interpolated as diffusers does; others in the scheduler's own list of steps.

    Args:
        scheduler: A diffusers scheduler; None stands for Stable Diffusion's training schedule.
        timestep: One number or [B].
    """
    steps = np.asarray(timestep, np.float64)
    if scheduler is None:
        return interpolate(stable_diffusion_levels(), steps)
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is None or scheduler.config.get("timestep_type") == "continuous":
        return _listed(scheduler, steps)
    return interpolate(levels_of(_host(kept)), steps)


def interpolate(levels: Floats, timestep: Floats) -> Floats:
    """sigma at fractional timesteps, log sigma linear between the whole ones."""
    logs = np.log(np.maximum(levels, np.finfo(np.float32).tiny))
    return np.asarray(np.exp(np.interp(timestep, np.arange(len(levels)), logs)), np.float64)


def _listed(scheduler: Any, timestep: Floats) -> Floats:
    listed, sigmas = _host(scheduler.timesteps), _host(scheduler.sigmas)
    nearest = np.abs(listed[:, None] - timestep.reshape(1, -1)).argmin(axis=0)
    return np.asarray(sigmas[nearest].reshape(timestep.shape), np.float64)


def _host(values: Any) -> Floats:
    return np.asarray(values.cpu().numpy() if hasattr(values, "cpu") else values, np.float64)

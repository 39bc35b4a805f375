"""The noise level sigma of a timestep of a diffusers scheduler."""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# With zero terminal SNR the last alphas_cumprod is 0. diffusers' Euler scheduler uses this value instead,
# which keeps sigma finite (rescale_betas_zero_snr in scheduling_euler_discrete.py).
_SMALLEST_ALPHA = 2.0**-24


def stable_diffusion_levels() -> Floats:
    """sigma of each of the 1000 training timesteps of Stable Diffusion 1, 2 and XL."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return _sigmas(np.cumprod(1.0 - betas, dtype=np.float64))


def noise_levels(scheduler: Any, timestep: Any) -> Floats:
    """sigma of `timestep`, with the same shape.

    Timesteps that count training steps, also fractional ones, are looked up in the training schedule, with
    log sigma interpolated as in diffusers. Others are looked up in the scheduler's list of timesteps.

    Args:
        scheduler: A diffusers scheduler; None is Stable Diffusion's training schedule.
        timestep: One number or [B].
    """
    timesteps = np.asarray(timestep, np.float64)
    if scheduler is None:
        return _interpolate(stable_diffusion_levels(), timesteps)
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None or scheduler.config.get("timestep_type") == "continuous":
        return _nearest(scheduler, timesteps)
    return _interpolate(_sigmas(_to_numpy(alphas_cumprod)), timesteps)


def edm_noise_levels(timestep: Any) -> Floats:
    """sigma of the timesteps of an EDM model, which are log(sigma) / 4, with the same shape."""
    return np.asarray(np.exp(4.0 * np.asarray(timestep, np.float64)), np.float64)


def _sigmas(alphas_cumprod: Floats) -> Floats:
    """sigma = sqrt((1 - a) / a) of each a in `alphas_cumprod`."""
    alphas = np.clip(alphas_cumprod, _SMALLEST_ALPHA, 1.0)
    return np.asarray(np.sqrt((1.0 - alphas) / alphas), np.float64)


def _interpolate(levels: Floats, timesteps: Floats) -> Floats:
    """sigma at fractional timesteps; log sigma is linear between integers."""
    logs = np.log(np.maximum(levels, np.finfo(np.float32).tiny))
    return np.asarray(np.exp(np.interp(timesteps, np.arange(len(levels)), logs)), np.float64)


def _nearest(scheduler: Any, timesteps: Floats) -> Floats:
    known, sigmas = _to_numpy(scheduler.timesteps), _to_numpy(scheduler.sigmas)
    nearest = np.abs(known[:, None] - timesteps.reshape(1, -1)).argmin(axis=0)
    return np.asarray(sigmas[nearest].reshape(timesteps.shape), np.float64)


def _to_numpy(values: Any) -> Floats:
    return np.asarray(values.cpu().numpy() if hasattr(values, "cpu") else values, np.float64)

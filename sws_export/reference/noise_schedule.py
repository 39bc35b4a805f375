"""Quantities of the method that depend on the noise level of a sample alone."""

import dataclasses
import math

import torch
from torch import Tensor

from graph_passes.parameters import SwsParameters


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Quantities of each sample, float32 or float64.

    Attributes:
        u: Denoising progress in [0, 1], [B]; for `schedule="noise"` the remaining noise instead.
        w: Bell-shaped weight of the mixing amplitude, [B].
        kappa: KL budget of the key mixing in nats, [B].
        g: Factor of the value mixing, which falls from 1 to 0.5, [B].
        tau_q: Temperature of the queries, [B]; exactly 1 at intensity 0.
        blend: Weights of the fine, middle and coarse transport, [B, 3]; each row sums to 1.
    """

    u: Tensor
    w: Tensor
    kappa: Tensor
    g: Tensor
    tau_q: Tensor
    blend: Tensor


def schedule(sigma: Tensor, intensity: Tensor, parameters: SwsParameters) -> Schedule:
    """The schedule of each sample.

    Args:
        sigma: Noise levels > 0, [B], any float dtype.
        intensity: Strengths in [0, 1], [B].
        parameters: Parameters of the method.

    Returns:
        Tensors in float64 if `sigma` is float64, otherwise in float32.
    """
    dtype = torch.promote_types(sigma.dtype, torch.float32)
    intensity = intensity.to(dtype)
    u = _progress(sigma.to(dtype), parameters)
    return Schedule(
        u=u,
        w=4 * u * (1 - u),
        kappa=parameters.kl_slope * (1 - u) + parameters.kl_floor,
        g=0.5 + 0.5 * (1 - u),
        tau_q=1 + parameters.theta * intensity * (1 - u),
        blend=blend_weights(u),
    )


def _progress(sigma: Tensor, parameters: SwsParameters) -> Tensor:
    """Position of log sigma between log sigma_max (0) and log sigma_min (1)."""
    log_max, log_min = math.log(parameters.sigma_max), math.log(parameters.sigma_min)
    u = ((log_max - sigma.log()) / (log_max - log_min)).clamp(0, 1)
    return 1 - u if parameters.schedule == "noise" else u


def blend_weights(u: Tensor) -> Tensor:
    """Weights of the fine, middle and coarse transport.

    Args:
        u: Denoising progress in [0, 1], [B].

    Returns:
        [B, 3] in the dtype of `u`; each row sums to 1.
    """
    weights = torch.stack([0.5 * (1 - u), u * (1 - u), u], dim=1)
    return weights / weights.sum(dim=1, keepdim=True)

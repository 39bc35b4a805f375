"""Nearly doubly stochastic transports between the tokens of a grid, dense and banded.

Tokens are in row-major order: token i = y * width + x. A dense transport is [B, T, T], T = height * width. In
its banded layout [B, 145, height, width], entry (b, j, y, x) is the matrix element of row token (y, x) and
column token (y, x) + offset j of `diamond_offsets(STATE_RADIUS)`, or 0 if the column is outside the grid.
"""

import torch
from torch import Tensor

from graph_passes.parameters import STATE_RADIUS, SwsParameters, diamond_offsets
from sws_export.reference.noise_schedule import blend_weights

SUM_FLOOR = 1e-8
"""Lower bound of the row and column sums in divisions, so that an all-zero transport stays zero."""


def rebalance(transport: Tensor, iters: int) -> Tensor:
    """Sinkhorn iterations: normalize the rows, then the columns, to sum 1.

    Args:
        transport: Nonnegative, [..., T, T].
        iters: Number of iterations.

    Returns:
        A new tensor of the same shape and dtype. It does not depend on the scale of `transport`.
    """
    for _ in range(iters):
        transport = transport / transport.sum(dim=-1, keepdim=True).clamp(min=SUM_FLOOR)
        transport = transport / transport.sum(dim=-2, keepdim=True).clamp(min=SUM_FLOOR)
    return transport


def scale_transport(
    height: int, width: int, scale: int, parameters: SwsParameters, dtype: torch.dtype
) -> Tensor:
    """The entropic transport of one scale, which depends on the grid only.

    The cost is the L1 distance divided by `scale`, and infinite for distances above `scale`.

    Returns:
        [T, T] in `dtype`.
    """
    token = torch.arange(height * width)
    y, x = token // width, token % width
    distance = (y[:, None] - y[None, :]).abs() + (x[:, None] - x[None, :]).abs()
    kernel = torch.exp(-(distance.to(dtype) / scale) / parameters.tau)
    kernel = torch.where(distance <= scale, kernel, 0.0)
    return rebalance(kernel, parameters.sinkhorn_iters)


def blended_transport(u: Tensor, height: int, width: int, parameters: SwsParameters) -> Tensor:
    """The weighted sum of the transports of the three scales, rebalanced.

    Args:
        u: Denoising progress, [B], float32 or float64.
        height: Rows of the token grid.
        width: Columns of the token grid.
        parameters: Parameters of the method.

    Returns:
        [B, T, T] in the dtype of `u`.
    """
    weights = blend_weights(u)
    blended = torch.zeros(len(u), height * width, height * width, dtype=u.dtype, device=u.device)
    for ordinal, scale in enumerate(parameters.scales):
        of_scale = scale_transport(height, width, scale, parameters, u.dtype).to(u.device)
        blended = blended + weights[:, ordinal, None, None] * of_scale
    return rebalance(blended, parameters.rebalance_iters)


def momentum(previous: Tensor, transport: Tensor, parameters: SwsParameters) -> Tensor:
    """Exponential moving average over the sampling steps, rebalanced.

    Args:
        previous: Result of the previous step, [B, T, T]; zeros for the first step.
        transport: Transport of this step, [B, T, T].
        parameters: Parameters of the method.

    Returns:
        [B, T, T]; `rebalance(transport)` if `previous` is zero.
    """
    average = parameters.beta * previous + (1 - parameters.beta) * transport
    return rebalance(average, parameters.rebalance_iters)


def band_from_dense(transport: Tensor, height: int, width: int) -> Tensor:
    """The banded layout of a dense transport: its entries within L1 distance 8.

    Args:
        transport: [B, T, T].
        height: Rows of the token grid.
        width: Columns of the token grid.

    Returns:
        [B, 145, height, width] in the same dtype.
    """
    entry, source, target = _band_indices(height, width)
    band = transport.new_zeros(len(transport), len(diamond_offsets(STATE_RADIUS)), height * width)
    band[:, entry, source] = transport[:, source, target]
    return band.view(len(band), -1, height, width)


def dense_from_band(band: Tensor) -> Tensor:
    """The inverse of `band_from_dense`; entries outside the grid are ignored.

    Args:
        band: [B, 145, height, width].

    Returns:
        [B, T, T] in the same dtype.
    """
    height, width = band.shape[2:]
    entry, source, target = _band_indices(height, width)
    transport = band.new_zeros(len(band), height * width, height * width)
    transport[:, source, target] = band.flatten(2)[:, entry, source]
    return transport


def _band_indices(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the offset, source token and target token of each entry whose target is on the grid."""
    offset_y, offset_x = torch.tensor(diamond_offsets(STATE_RADIUS)).T
    token = torch.arange(height * width)
    target_y = offset_y[:, None] + token // width
    target_x = offset_x[:, None] + token % width
    inside = (target_y >= 0) & (target_y < height) & (target_x >= 0) & (target_x < width)
    entry, source = inside.nonzero(as_tuple=True)
    return entry, source, (target_y * width + target_x)[entry, source]

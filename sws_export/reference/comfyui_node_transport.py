"""The transport between text tokens of the ComfyUI node: one dense matrix, shared across the batch.

Tokens form a grid in row-major order: token i = y * width + x. A transport is [n, n], float32 or float64.
"""

import math

import torch
from torch import Tensor

from graph_passes.parameters import SwsParameters
from sws_export.reference.transport import rebalance

_OUTSIDE = -1e4


def text_grid(tokens: int) -> tuple[int, int]:
    """Height and width of the grid of `tokens` text tokens.

    The rule of the node only finds grids of n x n and (n + 1) x n tokens: 64 tokens are 8 x 8 and 72 are
    9 x 8, but 77, 154 and 231 tokens are one row.
    """
    width = round(math.sqrt(tokens))
    height = tokens // width
    if height * width < tokens:
        height += 1
    return (height, width) if height * width == tokens else (1, tokens)


def transport_radius(height: int, width: int, u: float) -> int:
    """L1 radius of the transport at remaining noise `u` on a grid of `height` x `width` tokens."""
    reach = max(1, int(8 * (1 - u)))
    return max(1, int(0.5 * max(1, min(height, width, reach) // 2)))


def fresh_transport(tokens: int, u: Tensor, parameters: SwsParameters) -> Tensor:
    """The transport of one step, without the moving average.

    Args:
        tokens: Number n of text tokens.
        u: Remaining noise in [0, 1], [1], float32 or float64.
        parameters: Parameters of the method.

    Returns:
        [n, n] in the dtype of `u`.
    """
    height, width = text_grid(tokens)
    radius = transport_radius(height, width, float(u))
    token = torch.arange(tokens, device=u.device)
    y, x = token // width, token % width
    distance = ((y[:, None] - y[None, :]).abs() + (x[:, None] - x[None, :]).abs()).to(u.dtype)
    score = torch.where(distance <= radius, -(distance / radius), _OUTSIDE)
    return rebalance((score / parameters.tau).softmax(dim=-1), parameters.sinkhorn_iters)


def moving_average(previous: Tensor, fresh: Tensor, parameters: SwsParameters) -> Tensor:
    """Exponential moving average of the transports of all calls.

    Args:
        previous: Average after the previous call, [n, n]; zeros if there was none.
        fresh: Transport of this step, [n, n].
        parameters: Parameters of the method.

    Returns:
        [n, n]; `fresh` if there is no `previous`.
    """
    if not previous.any():
        return fresh
    return rebalance(parameters.beta * previous + (1 - parameters.beta) * fresh, parameters.rebalance_iters)

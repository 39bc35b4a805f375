"""The transport between text tokens that the node keeps: one dense matrix for the whole batch.

Tokens lie on a grid in row-major order: token i = y * width + x. A transport is [n, n], float32 or float64.
"""

import math

import torch
from torch import Tensor

from graph_passes.parameters import SwsParameters
from sws_export.reference.transport import rebalance

_OUTSIDE = -1e4


def text_grid(tokens: int) -> tuple[int, int]:
    """Height and width of the grid of `tokens` text tokens.

    As near to a square as the number allows by the node's rule, which finds squares and n(n + 1) only: 64 is
    8 x 8 and 72 is 9 x 8, while 77, 154 and 231 are one row.
    """
    width = round(math.sqrt(tokens))
    height = tokens // width
    if height * width < tokens:
        height += 1
    return (height, width) if height * width == tokens else (1, tokens)


def transport_radius(height: int, width: int, u: float) -> int:
    """L1 radius of the transport on a grid of `height` x `width` tokens at u."""
    reach = max(1, int(8 * (1 - u)))
    return max(1, int(0.5 * max(1, min(height, width, reach) // 2)))


def fresh_transport(tokens: int, u: Tensor, parameters: SwsParameters) -> Tensor:
    """The transport of one step, without its history.

    Args:
        tokens: Number n of text tokens.
        u: Remaining noise in [0, 1], [1], float32 or float64.
        parameters: The constants of the method.

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
    """The transport of one call, in which those of earlier calls linger.

    Args:
        previous: What the call before kept, [n, n]; zeros mean that there was none.
        fresh: Of this step, [n, n].
        parameters: The constants of the method.

    Returns:
        [n, n]; `fresh` as it is where there is no `previous`.
    """
    if not previous.any():
        return fresh
    return rebalance(parameters.beta * previous + (1 - parameters.beta) * fresh, parameters.rebalance_iters)

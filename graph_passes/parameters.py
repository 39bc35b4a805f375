"""The constants of Sigma-Weighted Shuffle that are fixed when a graph is exported."""

import dataclasses
from typing import Literal

STATE_RADIUS = 8
"""L1 radius of the banded transport in the state of a graph, for all `scales`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwsParameters:
    """Parameters of the SWS operators, with the values of the published method.

    Attributes:
        sigma_min: Noise level at and below which progress u is 1.
        sigma_max: Noise level at and above which progress u is 0.
        tau: Temperature of the transport kernel exp(-cost / tau).
        sinkhorn_iters: Row/column normalizations of the transport of one scale.
        rebalance_iters: Row/column normalizations after blending the scales, and after the momentum.
        beta: Weight of the previous step's transport.
        bisection_steps: Halvings of [0, key_cap * a] in the search for the key mixing.
        key_cap: Largest key mixing at an amplitude of 1.
        value_cap: Value mixing at an amplitude of 1.
        u_stop: Progress from which on keys are not mixed.
        kl_floor: KL budget (nats) at the end of sampling.
        kl_slope: KL budget (nats) added at the start, decreasing linearly in u.
        theta: Query temperature at intensity 1 and u = 0, minus 1.
        scales: Three L1 radii, none below the one before: fine, middle and coarse transport.
        schedule: `progress` (u increases as sigma decreases) or `noise` (the schedule is reversed).
    """

    sigma_min: float = 0.28
    sigma_max: float = 25.0
    tau: float = 0.3
    sinkhorn_iters: int = 2
    rebalance_iters: int = 2
    beta: float = 0.8
    bisection_steps: int = 7
    key_cap: float = 0.3
    value_cap: float = 0.6
    u_stop: float = 0.75
    kl_floor: float = 0.01
    kl_slope: float = 0.08
    theta: float = 1.0
    scales: tuple[int, int, int] = (2, 4, 8)
    schedule: Literal["progress", "noise"] = "progress"


def diamond_offsets(radius: int) -> list[tuple[int, int]]:
    """Offsets (dy, dx) with |dy| + |dx| <= radius, ordered by dy, then dx.

    Returns:
        2 * radius**2 + 2 * radius + 1 pairs; entry j of a banded transport belongs to pair j.
    """
    return [
        (dy, dx)
        for dy in range(-radius, radius + 1)
        for dx in range(-(radius - abs(dy)), radius - abs(dy) + 1)
    ]

"""Time of each operator at each attention site, and of its alternatives."""

import dataclasses
from typing import Any

import torch

from benchmarks.gpu.kernels import Kernels
from benchmarks.gpu.references import (
    dense_transport,
    literal_guard,
    make_guard_inputs,
    make_weights,
    plain_attention,
    rebalance_band,
)
from benchmarks.gpu.sites import Site
from benchmarks.gpu.timing import time_graph

RADIUS = 8
# A budget that no alpha reaches (the common case: one pass), and one that decides alpha (a second pass).
WIDE_BUDGET, TIGHT_BUDGET = 0.5, 1e-3
LITERAL_BYTES_LIMIT = 40e9


@dataclasses.dataclass(frozen=True)
class SiteTimings:
    """Microseconds of one site; None if an alternative does not fit in memory."""

    site: str
    transport: float
    transport_two_launches: float
    dense_matmul: float
    copy_same_bytes: float
    mix: float
    guard: float
    guard_tight_budget: float
    guard_idle: float
    literal_guard: float | None
    attention: float

    def as_json(self) -> dict[str, Any]:
        """A record for the results file."""
        return dataclasses.asdict(self)


def time_site(kernels: Kernels, site: Site, device: str, dtype: torch.dtype = torch.float16) -> SiteTimings:
    """Measure all timings of one site."""
    weights = make_weights(site.batch, (site.side, site.side), RADIUS, device)
    q, k, k_perm, scalars = make_guard_inputs(
        site.batch, site.tokens, site.channels, dtype, device, kappa=WIDE_BUDGET, sharpness=2
    )
    v = torch.randn_like(k)
    moved = [torch.empty_like(k), torch.empty_like(v)]
    dense = dense_transport(weights, RADIUS).to(dtype)
    both = torch.cat([k, v], -1)
    workspace = kernels.guard_workspace(q, site.heads, 7)
    outputs = [torch.empty(site.batch, device=device) for _ in range(2)]
    moved_bytes = (weights.nbytes + 4 * k.nbytes) // 2
    source = torch.empty(moved_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def guard(budget: float, amplitude: float = 0.5) -> float:
        chosen = list(scalars)
        chosen[1], chosen[2] = (torch.full_like(chosen[1], value) for value in (amplitude, budget))
        return time_graph(
            lambda: kernels.key_guard(q, k, k_perm, chosen, site.heads, workspace=workspace, outputs=outputs)
        )

    def two_launches() -> None:
        for x, y in zip((k, v), moved, strict=True):
            kernels.banded_transport(weights, [x], RADIUS, [y])

    share = torch.full((site.batch, 1, 1), 0.25, dtype=dtype, device=device)

    def mix() -> None:
        for x, y in zip((k, v), moved, strict=True):
            torch.lerp(x, y, share)

    # base, delta, log_a0 and the temporaries of one bisection step, in bytes.
    literal_bytes = 8 * 4 * site.batch * site.heads * site.tokens**2
    return SiteTimings(
        site=site.name,
        transport=time_graph(lambda: kernels.banded_transport(weights, [k, v], RADIUS, moved)),
        transport_two_launches=time_graph(two_launches),
        dense_matmul=time_graph(lambda: torch.bmm(dense, both)),
        copy_same_bytes=time_graph(lambda: target.copy_(source)),
        mix=time_graph(mix),
        guard=guard(WIDE_BUDGET),
        guard_tight_budget=guard(TIGHT_BUDGET),
        guard_idle=guard(WIDE_BUDGET, amplitude=0.0),
        literal_guard=(
            time_graph(lambda: literal_guard(q, k, k_perm, scalars, site.heads))
            if literal_bytes < LITERAL_BYTES_LIMIT
            else None
        ),
        attention=time_graph(lambda: plain_attention(q, k, v, site.heads)),
    )


def time_state_update(site: Site, device: str) -> float:
    """Microseconds of computing the transport of a grid once a step: blend and momentum."""
    shape = (site.side, site.side)
    scales = [make_weights(site.batch, shape, RADIUS, device, seed) for seed in range(3)]
    state = make_weights(site.batch, shape, RADIUS, device, 3)

    def update() -> torch.Tensor:
        blend = rebalance_band(0.2 * scales[0] + 0.3 * scales[1] + 0.5 * scales[2], 2)
        return rebalance_band(0.8 * state + 0.2 * blend, 2)

    return time_graph(update)

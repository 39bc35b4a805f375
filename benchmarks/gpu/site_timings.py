"""The cost of each operator at each attention site, beside the operations that it competes with."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.gpu.fused_guard import fused_guard
from benchmarks.gpu.kernels import Kernels
from benchmarks.gpu.references import (
    SearchInputs,
    dense_transport,
    gather_kernel,
    literal_guard,
    make_guard_inputs,
    make_weights,
    plain_attention,
    rebalance_band,
)
from benchmarks.gpu.sizes import SiteGroup
from benchmarks.gpu.timing import Work, input_sets, time_graph

RADIUS = 8
# A budget that no alpha exceeds (the common case: one pass over the keys), and one that binds (three passes).
WIDE_BUDGET, TIGHT_BUDGET = 0.5, 1e-3
LITERAL_BYTES_LIMIT = 40e9
Timer = Callable[[Sequence[Work]], float]
"""Microseconds of one call, from calls of the same work on other inputs."""


@dataclasses.dataclass(frozen=True)
class SiteTimings:
    """Microseconds of one site; None for a competitor that does not fit in memory."""

    site: str
    sets: int
    """Sets of inputs in rotation."""
    transport: float
    transport_two_launches: float
    dense_matmul: float
    copy_same_bytes: float
    mix: float
    guard: float
    guard_tight_budget: float
    guard_idle: float
    fused_guard: float
    """The guard of the GPU lowering, of four fused attentions."""
    literal_guard: float | None
    attention: float

    def as_json(self) -> dict[str, Any]:
        """A record for the results file."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class SiteInputs:
    """Inputs and outputs of one call at a site."""

    weights: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_perm: torch.Tensor
    moved: list[torch.Tensor]
    both: torch.Tensor
    workspace: torch.Tensor
    outputs: list[torch.Tensor]


def make_site_inputs(kernels: Kernels, site: SiteGroup, device: str, dtype: torch.dtype) -> list[SiteInputs]:
    """Sets of the same values at different addresses."""
    weights = make_weights(site.batch, (site.side, site.side), RADIUS, device)
    q, k, k_perm, _ = make_guard_inputs(site.batch, site.tokens, site.channels, dtype, device, sharpness=2)
    v = torch.randn_like(k)
    first = SiteInputs(
        weights,
        q,
        k,
        v,
        k_perm,
        [torch.empty_like(k), torch.empty_like(v)],
        torch.cat([k, v], -1),
        kernels.guard_workspace(q, site.heads, 7),
        [torch.empty(site.batch, device=device) for _ in range(2)],
    )
    # The smallest working set of the timed calls: three tensors like k.
    count = input_sets(3 * k.nbytes)
    return [first] + [
        SiteInputs(*(_copy(getattr(first, field.name)) for field in dataclasses.fields(first)))
        for _ in range(count - 1)
    ]


def _copy(value: Any) -> Any:
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def time_site(
    kernels: Kernels,
    site: SiteGroup,
    device: str,
    dtype: torch.dtype = torch.float16,
    time: Timer = time_graph,
) -> SiteTimings:
    """All timings of one site."""
    sets = make_site_inputs(kernels, site, device, dtype)
    scalars = make_guard_inputs(site.batch, 1, site.channels, dtype, device, kappa=WIDE_BUDGET)[3]
    dense = dense_transport(sets[0].weights, RADIUS).to(dtype)
    source = torch.empty(
        (sets[0].weights.nbytes + 4 * sets[0].k.nbytes) // 2, dtype=torch.uint8, device=device
    )
    copies = [(source, torch.empty_like(source))]
    copies += [(source.clone(), torch.empty_like(source)) for _ in range(len(sets) - 1)]
    share = torch.full((site.batch, 1, 1), 0.25, dtype=dtype, device=device)

    def each(call: Callable[[SiteInputs], object]) -> float:
        return time([lambda inputs=inputs: call(inputs) for inputs in sets])

    def guard(budget: float, amplitude: float = 0.5) -> float:
        chosen = with_values(scalars, amplitude, budget)
        return each(
            lambda x: kernels.key_guard(
                x.q, x.k, x.k_perm, chosen, site.heads, workspace=x.workspace, outputs=x.outputs
            )
        )

    # base, delta, log_a0 and the temporaries of one bisection step.
    literal_bytes = 8 * 4 * site.batch * site.heads * site.tokens**2
    x0 = sets[0]
    return SiteTimings(
        site=site.name,
        sets=len(sets),
        transport=each(lambda x: kernels.banded_transport(x.weights, [x.k, x.v], RADIUS, x.moved)),
        transport_two_launches=each(
            lambda x: [
                kernels.banded_transport(x.weights, [tensor], RADIUS, [moved])
                for tensor, moved in zip((x.k, x.v), x.moved, strict=True)
            ]
        ),
        dense_matmul=each(lambda x: torch.bmm(dense, x.both)),
        copy_same_bytes=time([lambda pair=pair: pair[1].copy_(pair[0]) for pair in copies]),
        mix=each(lambda x: [torch.lerp(a, b, share) for a, b in zip((x.k, x.v), x.moved, strict=True)]),
        guard=guard(WIDE_BUDGET),
        guard_tight_budget=guard(TIGHT_BUDGET),
        guard_idle=guard(WIDE_BUDGET, amplitude=0.0),
        fused_guard=each(lambda x: fused_guard(x.q, x.k, x.k_perm, scalars, site.heads)),
        literal_guard=(
            # Its logits exceed the cache; one set of inputs will do.
            time([lambda: literal_guard(x0.q, x0.k, x0.k_perm, scalars, site.heads)])
            if literal_bytes < LITERAL_BYTES_LIMIT
            else None
        ),
        attention=each(lambda x: plain_attention(x.q, x.k, x.v, site.heads)),
    )


def with_values(scalars: SearchInputs, amplitude: float, budget: float) -> SearchInputs:
    """The scalars of a guard call with another amplitude and budget."""
    chosen = list(scalars)
    chosen[1], chosen[2] = (torch.full_like(chosen[1], value) for value in (amplitude, budget))
    return chosen


def time_state_update(site: SiteGroup, device: str, time: Timer = time_graph) -> float:
    """Microseconds of the new transport of a grid, once per step: blend and momentum."""
    shape = (site.side, site.side)
    gather = gather_kernel(RADIUS, device)
    bands = [make_weights(site.batch, shape, RADIUS, device, seed) for seed in range(4)]
    sets = [bands] + [[band.clone() for band in bands] for _ in range(input_sets(4 * bands[0].nbytes) - 1)]

    def update(scales: list[torch.Tensor]) -> torch.Tensor:
        blend = rebalance_band(0.2 * scales[0] + 0.3 * scales[1] + 0.5 * scales[2], gather, 2)
        return rebalance_band(0.8 * scales[3] + 0.2 * blend, gather, 2)

    return time([lambda scales=scales: update(scales) for scales in sets])

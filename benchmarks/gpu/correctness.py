"""Compare both kernels with references over many shapes; errors may be at most 2 x those of plain torch."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.kernels import Kernels
from benchmarks.gpu.references import (
    dense_transport,
    literal_guard,
    make_guard_inputs,
    make_weights,
)

GRIDS = ((1, 1), (5, 7), (8, 8), (16, 16), (17, 33), (64, 24), (64, 64))
RADII = (2, 4, 8)
CHANNELS = (8, 40, 320, 33)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# (tokens, heads, head size)
GUARD_SHAPES = ((64, 8, 160), (100, 2, 40), (256, 8, 160), (300, 3, 64), (1024, 2, 80), (77, 2, 41))

# Half a unit in the last place: errors below it are rounding of the result.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-22}

# Error bound of a measured mean KL; a step may differ from the literal one only within it.
KL_BOUND = 2e-6


# Replaces an error that is NaN or infinite.
WRONG = 1e30


@dataclasses.dataclass(frozen=True)
class Finding:
    """One comparison."""

    kernel: str
    case: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is allowed."""
        return self.error <= self.allowed

    def as_json(self) -> dict[str, Any]:
        """A record for the results file."""
        return dataclasses.asdict(self) | {"passed": self.passed}


def check_transport(kernels: Kernels, device: str) -> Iterator[Finding]:
    """Every grid, radius, channel count and dtype; keys and values in one launch."""
    for grid, radius in itertools.product(GRIDS, RADII):
        weights = make_weights(2, grid, radius, device)
        dense = dense_transport(weights, radius).double()
        for channels, dtype in itertools.product(CHANNELS, DTYPES):
            keys, values = torch.randn(2, 2, grid[0] * grid[1], channels, device=device).to(dtype)
            found = kernels.banded_transport(weights, [keys, values], radius)
            case = f"{grid[0]}x{grid[1]} radius {radius} channels {channels} {dtype}"
            for x, y in zip((keys, values), found, strict=True):
                exact = dense @ x.double()
                plain = (dense.to(dtype) @ x - exact).abs().max()
                floor = ROUNDING[dtype] * exact.abs().max()
                error = (y - exact).abs().max().nan_to_num(nan=WRONG, posinf=WRONG)
                allowed = 2 * max(float(plain), float(floor))
                yield Finding("banded_transport", case, float(error), allowed)


def check_guard(kernels: Kernels, device: str) -> Iterator[Finding]:
    """Every shape and dtype, with budgets that bind and budgets that do not."""
    for (tokens, heads, head_size), dtype, kappa in itertools.product(
        GUARD_SHAPES, DTYPES, (1e-3, 5e-3, 0.5)
    ):
        q, k, k_perm, scalars = make_guard_inputs(
            2, tokens, heads * head_size, dtype, device, sharpness=2, kappa=kappa
        )
        alpha, value = kernels.key_guard(q, k, k_perm, scalars, heads)
        bounds = [
            literal_guard(q, k, k_perm, _with_budget(scalars, change), heads, dtype=torch.float64)
            for change in (-KL_BOUND, KL_BOUND)
        ]
        low, high = bounds[0][0], bounds[1][0]
        cap = scalars[3].new_tensor(0.3) * 2 * bounds[0][1]  # value_gain is 1/2, so this is key_cap * a
        steps = torch.maximum(low - alpha, alpha - high).clamp_min(0) / (cap / 128)
        case = f"T {tokens} heads {heads} D {head_size} {dtype} kappa {kappa}"
        most = steps.max().nan_to_num(nan=WRONG, posinf=WRONG)
        yield Finding("key_guard alpha_k, steps", case, float(most), 0.02)
        error = (value - bounds[0][1]).abs().max().nan_to_num(nan=WRONG)
        yield Finding("key_guard a_v", case, float(error), 1e-5)


def _with_budget(scalars: list[torch.Tensor], change: float) -> list[torch.Tensor]:
    return [*scalars[:2], scalars[2] + change, *scalars[3:]]

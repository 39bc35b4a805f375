"""Both kernels on the GPU over a sweep of shapes: each error at most twice that of plain torch.

Every call is made twice, with outputs and a workspace filled with NaN: both results must have the same bits.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.fused_guard import fused_guard
from benchmarks.gpu.kernels import Kernels
from benchmarks.gpu.references import (
    SearchInputs,
    dense_transport,
    literal_guard,
    make_guard_inputs,
    make_weights,
    one_hot_guard_inputs,
)
from benchmarks.gpu.sizes import Sweep

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Rounding a result costs half a unit in the last place; smaller errors are not compared.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-22}

# Accuracy of a measured mean KL; a step may differ from the literal one only within it.
KL_BOUND = 2e-6

# Replaces an error that is not a number.
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
        """Whether the error is within the allowed one."""
        return self.error <= self.allowed

    def as_json(self) -> dict[str, Any]:
        """A record for the results file."""
        return dataclasses.asdict(self) | {"passed": self.passed}


def check_transport(kernels: Kernels, device: str, sweep: Sweep) -> Iterator[Finding]:
    """Every grid, radius, number of channels and number format; keys and values in one launch."""
    for grid, radius in itertools.product(sweep.grids, sweep.radii):
        weights = make_weights(2, grid, radius, device)
        dense = dense_transport(weights, radius).double()
        for channels, dtype in itertools.product(sweep.channels, DTYPES):
            keys, values = torch.randn(2, 2, grid[0] * grid[1], channels, device=device).to(dtype)
            case = f"{grid[0]}x{grid[1]} radius {radius} channels {channels} {dtype}"
            runs = [
                kernels.banded_transport(
                    weights, [keys, values], radius, [_poisoned(keys), _poisoned(values)]
                )
                for _ in range(2)
            ]
            for x, y in zip((keys, values), runs[0], strict=True):
                exact = dense @ x.double()
                plain = (dense.to(dtype) @ x - exact).abs().max()
                floor = ROUNDING[dtype] * exact.abs().max()
                error = (y - exact).abs().max().nan_to_num(nan=WRONG, posinf=WRONG)
                allowed = 2 * max(float(plain), float(floor))
                yield Finding("banded_transport", case, float(error), allowed)
            yield _same_bits("banded_transport", case, runs)


def check_guard(kernels: Kernels, device: str, sweep: Sweep) -> Iterator[Finding]:
    """Every shape and number format, with budgets that bind and that do not; then the search rounds."""
    for shape, dtype, kappa in itertools.product(sweep.guard_shapes, DTYPES, sweep.budgets):
        q, k, k_perm, scalars = make_guard_inputs(
            shape.batch, shape.tokens, shape.heads * shape.head_size, dtype, device, sharpness=2, kappa=kappa
        )
        if shape.query_tokens != shape.tokens:
            q = make_guard_inputs(
                shape.batch, shape.query_tokens, q.shape[2], dtype, device, sharpness=2, seed=1
            )[0]
        yield from _check_guard_case(
            kernels, (q, k, k_perm), scalars, shape.heads, f"{shape} {dtype} kappa {kappa}"
        )
    for size, dtype in itertools.product(sweep.search_logits, DTYPES):
        q, k, k_perm, scalars = one_hot_guard_inputs(size, dtype, device)
        yield from _check_guard_case(kernels, (q, k, k_perm), scalars, 1, f"one-hot logits {size} {dtype}")


def check_fused_guard(_kernels: Kernels, device: str, sweep: Sweep) -> Iterator[Finding]:
    """The guard of the GPU lowering, in 16-bit formats: the literal step or a neighbour of it."""
    formats = (torch.float16, torch.bfloat16)
    for shape, dtype, kappa in itertools.product(sweep.fused_shapes, formats, sweep.budgets):
        q, k, k_perm, scalars = make_guard_inputs(
            shape.batch, shape.tokens, shape.heads * shape.head_size, dtype, device, sharpness=2, kappa=kappa
        )
        alpha, value = fused_guard(q, k, k_perm, scalars, shape.heads)
        literal = literal_guard(q, k, k_perm, scalars, shape.heads, dtype=torch.float64)
        case = f"{shape} {dtype} kappa {kappa}"
        # Steps in units of each one's own cap, so that the error of the cap does not count.
        steps = (
            128 / 0.3 / 2 * (alpha / value.clamp_min(1e-9) - literal[0] / literal[1].clamp_min(1e-9)).abs()
        )
        yield Finding("fused guard, steps", case, _number(steps), 1.02)
        yield Finding("fused guard, a_v relative", case, _number((value / literal[1] - 1).abs()), 5e-3)


def _number(errors: torch.Tensor) -> float:
    return float(errors.max().nan_to_num(nan=WRONG, posinf=WRONG))


def _check_guard_case(
    kernels: Kernels,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scalars: SearchInputs,
    heads: int,
    case: str,
) -> Iterator[Finding]:
    q, k, k_perm = tensors
    runs = []
    for _ in range(2):
        workspace = kernels.guard_workspace(q, heads, 7)
        if workspace is not None:
            workspace.fill_(0xFF)
        outputs = [_poisoned(scalars[0]) for _ in range(2)]
        runs.append(kernels.key_guard(q, k, k_perm, scalars, heads, workspace=workspace, outputs=outputs))
    alpha, value = runs[0]
    low, high = (
        literal_guard(q, k, k_perm, _with_budget(scalars, change), heads, dtype=torch.float64)
        for change in (-KL_BOUND, KL_BOUND)
    )
    cap = 0.3 * 2 * low[1]  # value_gain is 1/2, so this is key_cap * a
    steps = torch.maximum(low[0] - alpha, alpha - high[0]).clamp_min(0) / (cap / 128).clamp_min(1e-9)
    most = steps.max().nan_to_num(nan=WRONG, posinf=WRONG)
    yield Finding("key_guard alpha_k, steps", case, float(most), 0.02)
    error = (value - low[1]).abs().max().nan_to_num(nan=WRONG)
    yield Finding("key_guard a_v", case, float(error), 1e-5)
    yield _same_bits("key_guard", case, runs)


def _same_bits(kernel: str, case: str, runs: list[list[torch.Tensor]]) -> Finding:
    """Whether two runs gave the same bits."""
    first, second = ([x.contiguous().view(torch.uint8) for x in run] for run in runs)
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return Finding(f"{kernel}, second run", case, 0.0 if same else WRONG, 0.0)


def _poisoned(like: torch.Tensor) -> torch.Tensor:
    """An output in which every element that the kernel does not write remains NaN."""
    return torch.full_like(like, torch.nan)


def _with_budget(scalars: SearchInputs, change: float) -> SearchInputs:
    return [*scalars[:2], scalars[2] + change, *scalars[3:]]

"""The step search, on tables of divergences."""

import functools

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_passes.functions.building import Op, define_function
from graph_passes.functions.step_search import exact_step
from tests.graph_passes.functions.calls import FLOAT, Array, Call


@functools.cache
def search(halvings: int) -> Call:
    """Steps [B] from `table` [B, N], whose entry n is the divergence at n, and `kappa` [B]."""

    def body(op: Op, table, kappa):  # type: ignore[no-untyped-def]
        def divergence(op: Op, step):  # type: ignore[no-untyped-def]
            index = op.Unsqueeze(op.Cast(step, to=int(ir.DataType.INT64)), [1])
            return op.Squeeze(op.GatherElements(table, index, axis=1), [1])

        last = 2**halvings - 1
        at_last = divergence(op, op.Add(op.Mul(kappa, 0.0), float(last)))
        return exact_step(op, divergence, kappa, halvings, at_last)

    function = define_function("Search", body, {"table": FLOAT, "kappa": FLOAT}, ["step"])
    return Call({"Search": function}, "Search", {"table": ["batch", 2**halvings]}, FLOAT, {})


HALVINGS = (1, 2, 3, 5, 7, 8)


def expected(table: Array, kappa: Array) -> list[int]:
    return [int(np.flatnonzero(row <= budget)[-1]) for row, budget in zip(table, kappa, strict=True)]


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, Array, Array]:
    """Rising tables, smooth or with jumps or plateaus, and budgets within their range."""
    halvings = draw(st.sampled_from(HALVINGS))
    size = 2**halvings
    rows, budgets = [], []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["power", "jumps", "cliff"]))
        if kind == "power":
            rises = np.diff(np.arange(size) ** draw(st.floats(0.3, 6.0)), prepend=0.0)
        elif kind == "jumps":
            seed = draw(st.integers(0, 2**31))
            rises = 10.0 ** np.random.default_rng(seed).uniform(-8, 0, size)
        else:
            rises = np.where(np.arange(size) == draw(st.integers(1, size - 1)), 1.0, 1e-7)
        rises[0] = 0.0
        row = np.cumsum(rises)
        rows.append(row / row[-1])
        budgets.append(draw(st.floats(1e-4, 1.2)))
    return halvings, np.array(rows, np.float32), np.array(budgets, np.float32)


@settings(max_examples=80, deadline=None)
@given(tables())
def test_the_step_of_any_rising_divergence(case: tuple[int, Array, Array]) -> None:
    halvings, table, kappa = case
    (found,) = search(halvings)(table=table, kappa=kappa)
    assert found.tolist() == expected(table, kappa)


@pytest.mark.parametrize("halvings", HALVINGS)
def test_every_step_is_found(halvings: int) -> None:
    size = 2**halvings
    cliffs = np.array([np.arange(size) > step for step in range(size)], np.float32)
    (found,) = search(halvings)(table=cliffs, kappa=np.full(size, 0.5, np.float32))
    assert found.tolist() == list(range(size))


def test_number_of_evaluations() -> None:
    """One evaluation is that at the last step."""
    n = np.arange(128.0)
    smooth = np.array([(n / 127) ** 2 * 0.3], np.float32)
    assert search(7).executed(table=smooth, kappa=np.array([0.4], np.float32))["GatherElements"] == 1
    counts = [
        search(7).executed(table=smooth, kappa=np.array([kappa], np.float32))["GatherElements"]
        for kappa in (0.002, 0.02, 0.1, 0.2, 0.29)
    ]
    assert max(counts) <= 4
    cliffs = [
        search(7).executed(table=(n[None] > step).astype(np.float32), kappa=np.array([0.5], np.float32))[
            "GatherElements"
        ]
        for step in range(0, 127, 18)
    ]
    assert max(cliffs) <= 1 + 7 + 2


def test_samples_are_searched_independently() -> None:
    n = np.arange(128)
    table = np.array([n > 127, n > 3, n > 90], np.float32)
    (found,) = search(7)(table=table, kappa=np.full(3, 0.5, np.float32))
    assert found.tolist() == [127, 3, 90]

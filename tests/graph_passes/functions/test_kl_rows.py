"""Guards whose KL divergence is that of a lattice of the query rows, and whose entropies are those of all."""

from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.functions import MATERIALIZED_LOGITS, build_functions
from graph_passes.functions.attention import lattice_rows
from graph_passes.functions.building import Op, define_function
from graph_passes.guard import ROW_STRIDES, GuardForm, GuardOptions
from graph_passes.parameters import SwsParameters
from graph_passes.target import TARGETS
from sws_export.reference.unet import lattice
from tests.graph_passes.functions.calls import FLOAT, Array, Call
from tests.graph_passes.functions.fused_attention import Emulation
from tests.graph_passes.functions.oracle import Oracle
from tests.graph_passes.functions.rows import site_rows

PARAMETERS = SwsParameters()
HEIGHT, WIDTH, HEADS, SIZE = 12, 20, 2, 40
FLOAT16 = ir.DataType.FLOAT16
ROWS = GuardOptions.parse("fused", "kl:1/8")
TAU_Q, AMPLITUDE = (np.array(values, np.float32) for values in ([1.1, 1.5], [1.0, 0.8]))


def lattice_of(height: int, width: int, strides: tuple[int, int]) -> Array:
    found = lattice((height, width), 1, strides)
    assert found is not None
    return found.numpy()


@cache
def guard(form: GuardForm, target: str, dtype: ir.DataType = FLOAT, name: str = "KeyGuard") -> Call:
    options = GuardOptions.parse(form, ROWS.rows_text)
    functions = build_functions(PARAMETERS, dtype, TARGETS[target], options)
    shapes: dict[str, Any] = {x: ["batch", "tokens", HEADS * SIZE] for x in ("q", "k", "k_perm")}
    shapes["kl_rows"] = ["some"]
    return Call(functions, name, shapes, FLOAT, {"num_heads": HEADS, "scale": SIZE**-0.5})


def emulated() -> Emulation:
    return Emulation(guard("fused", "tensorrt-rtx", FLOAT16).model)


CALLS = {
    "literal": (lambda: guard("literal", "onnxruntime"), np.float32, 0),
    "branches": (lambda: guard("fused", "onnxruntime"), np.float32, 0),
    "means": (lambda: guard("fused", "onnxruntime-cuda"), np.float32, 1),
    "means, emulated float16": (emulated, np.float16, 1),
    "means, materialized logits": (lambda: guard("fused", "tensorrt-rtx"), np.float32, 1),
    "means, materialized logits of float16": (
        lambda: guard("fused", "tensorrt-rtx", FLOAT16, f"KeyGuard.{MATERIALIZED_LOGITS}"),
        np.float16,
        1,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_kl_of_the_lattice_and_entropies_of_all_rows(name: str) -> None:
    """Peaked rows and rows with very different temperatures in a batch, on a grid that is not square."""
    make, dtype, off = CALLS[name]
    rows = lattice_of(HEIGHT, WIDTH, ROWS.kl_strides)
    samples = [site_rows(kind, HEIGHT, WIDTH, HEADS, SIZE, 3) for kind in ("peaked", "mixed")]
    tokens = [np.stack(x).astype(dtype) for x in zip(*samples, strict=True)]
    whole, some = (
        [
            Oracle(q[picked], k, k_perm, HEADS, float(tau))
            for q, k, k_perm, tau in zip(*tokens, TAU_Q, strict=True)
        ]
        for picked in (slice(None), rows)
    )
    exact = np.array([oracle.entropy_factor() for oracle in whole]) * AMPLITUDE
    # A guard that took its entropies from the lattice would be far off.
    of_lattice = np.array([oracle.entropy_factor() for oracle in some]) * AMPLITUDE
    assert np.abs(of_lattice - exact).min() > 0.01

    call, apart = make(), []
    for share in (0.8, 0.3):
        limits = PARAMETERS.key_cap * exact * 127 / 128
        last = [oracle.divergence(limit) for oracle, limit in zip(some, limits, strict=True)]
        kappa = np.array(last, np.float32) * np.float32(share)
        alpha, mix = call(
            **dict(zip(("q", "k", "k_perm"), tokens, strict=True)),
            tau_q=TAU_Q,
            amplitude=AMPLITUDE,
            kappa=kappa,
            key_gate=np.ones(2, np.float32),
            value_gain=np.ones(2, np.float32),
            kl_rows=rows,
        )
        np.testing.assert_allclose(mix, exact, atol=1e-3)
        steps = np.rint(alpha / (PARAMETERS.key_cap * mix / 128))
        expected, all_rows = (
            [
                oracle.largest_step(a, float(budget), PARAMETERS)
                for oracle, a, budget in zip(oracles, exact, kappa, strict=True)
            ]
            for oracles in (some, whole)
        )
        assert np.abs(steps - expected).max() <= off
        assert max(expected) < 127
        apart += list(np.abs(np.subtract(expected, all_rows)))
    # The step of all rows is another one.
    assert max(apart) > 2


@cache
def rows_of_grid(strides: tuple[int, int]) -> Call:
    def body(op: Op, grid: Any) -> Any:
        return lattice_rows(op, op.Shape(grid), strides)

    function = define_function("Lattice", body, {"grid": FLOAT}, ["rows"])
    return Call({"Lattice": function}, "Lattice", {"grid": ["h", "w"]}, ir.DataType.INT64, {})


@pytest.mark.parametrize("strides", sorted(set(ROW_STRIDES.values()) - {(1, 1)}))
@pytest.mark.parametrize("grid", [(12, 8), (7, 13), (1, 9), (2, 1), (1, 1)])
def test_the_lattice_of_the_graph_is_that_of_the_reference(
    grid: tuple[int, int], strides: tuple[int, int]
) -> None:
    """A share of the rows in each direction, and never none."""
    (rows,) = rows_of_grid(strides)(grid=np.zeros(grid, np.float32))
    np.testing.assert_array_equal(rows, lattice_of(*grid, strides))
    assert len(rows) > 0
    if grid == (12, 8):
        assert len(rows) * strides[0] * strides[1] == 96

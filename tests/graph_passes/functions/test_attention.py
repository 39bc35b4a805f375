"""A whole site: guards that see a lattice of query rows, and the bypass."""

from fractions import Fraction
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.errors import GraphError
from graph_passes.functions import Guard, build_functions
from graph_passes.parameters import SwsParameters
from tests.graph_passes.functions.calls import FLOAT, Array, Call

HEIGHT, WIDTH, CHANNELS = 12, 8, 16
TOKENS = HEIGHT * WIDTH


@cache
def site(rows: Fraction, form: Guard = "fused") -> Call:
    tokens = ["batch", "tokens", CHANNELS]
    shapes = {"q": tokens, "k": tokens, "v": tokens, "transport": ["batch", 145, "height", "width"]}
    functions = build_functions(SwsParameters(), FLOAT, form, rows)
    return Call(functions, "Attention", shapes, FLOAT, {"num_heads": 2, "scale": 8**-0.5})


def run(call: Call, q: Array, amplitude: float = 1.0) -> Array:
    rng = np.random.default_rng(1)
    k, v = (rng.standard_normal((1, TOKENS, CHANNELS), dtype=np.float32) for _ in range(2))
    band = np.zeros((1, 145, HEIGHT, WIDTH), np.float32)
    band[:, 72], band[:, 73, :, :-1] = 0.4, 0.6  # to itself and to its right neighbour
    scalars = {
        "tau_q": 1.0,
        "amplitude": amplitude,
        "kappa": 0.02,
        "key_gate": 1.0,
        "value_gain": 0.6,
    }
    inputs = {name: np.array([value], np.float32) for name, value in scalars.items()}
    (y,) = call(q=q, k=k, v=v, transport=band, **inputs)
    return y


def queries_alike_in_cells(rows: int, columns: int) -> Array:
    """Queries [1, T, C] that are the same all over each cell of the grid."""
    rng = np.random.default_rng(0)
    cells = rng.standard_normal((HEIGHT // rows, WIDTH // columns, CHANNELS), dtype=np.float32)
    return 2 * cells.repeat(rows, 0).repeat(columns, 1).reshape(1, TOKENS, CHANNELS)


@pytest.mark.parametrize(
    ("share", "cell"), [("1/2", (1, 2)), ("1/4", (2, 2)), ("1/8", (4, 2)), ("1/16", (4, 4))]
)
def test_lattice_sees_one_row_of_each_cell(share: str, cell: tuple[int, int]) -> None:
    q = queries_alike_in_cells(*cell)
    np.testing.assert_allclose(run(site(Fraction(share)), q), run(site(Fraction(1)), q), atol=1e-5)


def test_lattice_is_an_approximation() -> None:
    q = 2 * np.random.default_rng(0).standard_normal((1, TOKENS, CHANNELS), dtype=np.float32)
    all_rows, some = run(site(Fraction(1)), q), run(site(Fraction(1, 8)), q)
    assert 1e-4 < np.abs(all_rows - some).max() < 0.3


def test_both_guards_give_the_same_site() -> None:
    q = 2 * np.random.default_rng(0).standard_normal((1, TOKENS, CHANNELS), dtype=np.float32)
    literal = run(site(Fraction(1), "literal"), q)
    np.testing.assert_allclose(run(site(Fraction(1)), q), literal, atol=1e-5)
    assert np.abs(run(site(Fraction(1)), q, amplitude=0.0) - literal).max() > 1e-3


def test_other_shares_are_refused() -> None:
    with pytest.raises(
        GraphError, match="guard rows: 1/3 is not supported; use one of 1, 1/2, 1/4, 1/8, 1/16"
    ):
        build_functions(SwsParameters(), ir.DataType.FLOAT, "fused", Fraction(1, 3))

"""A whole site: guards on a lattice of query rows, and the bypass."""

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.errors import GraphError
from graph_passes.functions import build_functions
from graph_passes.functions.attention import sampled_rows
from graph_passes.functions.building import Op, define_function
from graph_passes.guard import GuardForm, GuardOptions
from graph_passes.parameters import SwsParameters
from graph_passes.target import TARGETS
from tests.graph_passes.functions.calls import FLOAT, Array, Call

HEIGHT, WIDTH, CHANNELS = 12, 8, 16
TOKENS = HEIGHT * WIDTH
# Each step of the search adds branches of the same nodes.
PARAMETERS = SwsParameters(bisection_steps=4)


@cache
def site(rows: Fraction, form: GuardForm = "fused") -> Call:
    tokens = ["batch", "tokens", CHANNELS]
    shapes = {"q": tokens, "k": tokens, "v": tokens, "transport": ["batch", 145, "height", "width"]}
    functions = build_functions(PARAMETERS, FLOAT, TARGETS["onnxruntime"], GuardOptions(form, rows))
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
    """Queries [1, T, C], constant within each cell of the grid."""
    rng = np.random.default_rng(0)
    cells = rng.standard_normal((HEIGHT // rows, WIDTH // columns, CHANNELS), dtype=np.float32)
    return 2 * cells.repeat(rows, 0).repeat(columns, 1).reshape(1, TOKENS, CHANNELS)


@pytest.mark.parametrize(
    ("share", "cell"),
    [
        ("1/2", (1, 2)),
        pytest.param("1/4", (2, 2), marks=pytest.mark.slow),
        pytest.param("1/8", (4, 2), marks=pytest.mark.slow),
        ("1/16", (4, 4)),
    ],
)
def test_the_lattice_has_one_row_of_each_cell(share: str, cell: tuple[int, int]) -> None:
    """The longest and the shortest query are added, which changes means slightly."""
    q = queries_alike_in_cells(*cell)
    expected = run(site(Fraction(1)), q)
    assert np.abs(run(site(Fraction(share)), q) - expected).max() < 0.02
    assert np.abs(run(site(Fraction(1)), q, amplitude=0.9) - expected).max() > 0.02


@cache
def sampling(dtype: ir.DataType, strides: tuple[int, int]) -> Call:
    def body(op: Op, q: Any, grid: Any) -> Any:
        return sampled_rows(op, q, op.Shape(grid), strides, dtype)

    attribute = ir.Attr("num_heads", ir.AttributeType.INT, None)
    function = define_function("Rows", body, {"q": dtype, "grid": FLOAT}, ["rows"], [attribute])
    shapes: dict[str, Sequence[int | str]] = {"q": ["batch", "tokens", CHANNELS], "grid": ["h", "w"]}
    return Call({"Rows": function}, "Rows", shapes, dtype, {"num_heads": 2})


@pytest.mark.parametrize("strides", [(1, 2), (2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("grid", [(12, 8), (7, 13), (1, 9), (2, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_are_the_lattice_and_two_of_each_head(
    dtype: type, grid: tuple[int, int], strides: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    # Squares of these overflow in float16.
    q = (200 * rng.standard_normal((2, grid[0] * grid[1], CHANNELS))).astype(dtype)
    call = sampling(ir.DataType.from_numpy(np.dtype(dtype)), strides)
    (rows,) = call(q=q, grid=np.zeros(grid, np.float32))
    starts = [min(stride - 1, side - 1, 1) for stride, side in zip(strides, grid, strict=True)]
    lattice = q.reshape(2, *grid, CHANNELS)[:, starts[0] :: strides[0], starts[1] :: strides[1]]
    lattice = lattice.reshape(2, -1, CHANNELS)
    assert (rows[:, :-2] == lattice).all()
    heads = q.reshape(2, -1, 2, CHANNELS // 2)
    lengths = np.linalg.norm(heads.astype(np.float64), axis=3)
    for sample in range(2):
        for head in range(2):
            longest, shortest = rows[sample, -2:].reshape(2, 2, -1)[:, head]
            assert (longest == heads[sample, lengths[sample, :, head].argmax(), head]).all()
            assert (shortest == heads[sample, lengths[sample, :, head].argmin(), head]).all()


def test_sampling_keeps_the_range_of_entropies() -> None:
    """One row of low entropy is not on the lattice; without it the uncertainty of all others rises."""
    q = np.random.default_rng(0).standard_normal((1, TOKENS, CHANNELS), dtype=np.float32)
    q *= np.linspace(0.8, 1.2, TOKENS, dtype=np.float32)[:, None]
    certain, others = 2 * WIDTH + 2, np.arange(TOKENS) != 2 * WIDTH + 2
    without = run(site(Fraction(1)), q)
    q[0, certain] *= 20
    all_rows, some = run(site(Fraction(1)), q), run(site(Fraction(1, 8)), q)
    moved = np.abs(all_rows - without)[:, others].max()
    # Of 14 rows seen it is one, where it is one of 96: that is what is left of the error.
    assert np.abs(some - all_rows)[:, others].max() < 0.8 * moved


def test_the_lattice_is_an_approximation() -> None:
    q = 2 * np.random.default_rng(0).standard_normal((1, TOKENS, CHANNELS), dtype=np.float32)
    all_rows, some = run(site(Fraction(1)), q), run(site(Fraction(1, 8)), q)
    assert 1e-4 < np.abs(all_rows - some).max() < 0.3


def test_both_guards_give_the_same_output() -> None:
    q = 2 * np.random.default_rng(0).standard_normal((1, TOKENS, CHANNELS), dtype=np.float32)
    literal = run(site(Fraction(1), "literal"), q)
    np.testing.assert_allclose(run(site(Fraction(1)), q), literal, atol=1e-5)
    assert np.abs(run(site(Fraction(1)), q, amplitude=0.0) - literal).max() > 1e-3


@cache
def cross_site(rows: Fraction, form: GuardForm = "literal") -> Call:
    shapes: dict[str, Sequence[int | str]] = {
        "q": ["batch", "tokens", CHANNELS],
        "k": ["batch", "text", CHANNELS],
        "v": ["batch", "text", CHANNELS],
        "transport": ["batch", 145, 1, "text"],
        "query_grid": [2],
    }
    functions = build_functions(
        PARAMETERS, FLOAT, TARGETS["onnxruntime"], GuardOptions(form, rows), cross_attention=True
    )
    return Call(functions, "CrossAttention", shapes, FLOAT, {"num_heads": 2, "scale": 8**-0.5})


def run_cross(call: Call, q: Array, text: int, kappa: float = 0.02) -> Array:
    """The text is shorter or longer than the image; samples differ in text and amplitude."""
    rng = np.random.default_rng(1)
    k, v = (2 * rng.standard_normal((2, text, CHANNELS), dtype=np.float32) for _ in range(2))
    band = np.zeros((2, 145, 1, text), np.float32)
    band[:, 72], band[:, 73, :, :-1] = 0.4, 0.6  # to itself and to the next token
    inputs = {
        "tau_q": np.array([1.0, 1.4], np.float32),
        "amplitude": np.array([1.0, 0.5], np.float32),
        "kappa": np.full(2, kappa, np.float32),
        "key_gate": np.ones(2, np.float32),
        "value_gain": np.full(2, 0.6, np.float32),
    }
    if any(value.name == "query_grid" for value in call.model.graph.inputs):
        inputs["query_grid"] = np.array([HEIGHT, WIDTH])
    (y,) = call(q=np.concatenate([q, 0.5 * q]), k=k, v=v, transport=band, **inputs)
    return y


@pytest.mark.parametrize("text", [1, 5, 77, 154])
@pytest.mark.parametrize("kappa", [2e-3, 0.02, 1.0])
def test_both_guards_give_the_same_cross_attention(text: int, kappa: float) -> None:
    q = 2 * np.random.default_rng(0).standard_normal((1, TOKENS, CHANNELS), dtype=np.float32)
    literal = run_cross(cross_site(Fraction(1)), q, text, kappa)
    fused = run_cross(cross_site(Fraction(1), "fused"), q, text, kappa)
    np.testing.assert_allclose(fused, literal, atol=2e-5)


@pytest.mark.parametrize("form", ["fused", "literal"])
@pytest.mark.parametrize(("row", "seen"), [((2, 1), False), ((1, 1), True)])
def test_the_lattice_of_cross_attention_is_on_the_image_grid(
    row: tuple[int, int], seen: bool, form: GuardForm
) -> None:
    """A query of another direction on the lattice changes the other rows."""
    q = np.random.default_rng(0).standard_normal((1, TOKENS, CHANNELS), dtype=np.float32)
    q[:, 0] *= 5.0  # the longest and the shortest, which are seen in any case
    q[:, 2] *= 0.05
    turned, index = q.copy(), row[0] * WIDTH + row[1]
    turned[0, index] = q[0, index].reshape(2, -1)[:, ::-1].ravel()
    call = cross_site(Fraction(1, 4), form)
    one, other = run_cross(call, q, 77), run_cross(call, turned, 77)
    assert np.array_equal(one[:, : index - 1], other[:, : index - 1]) is not seen
    assert not np.array_equal(one[:, index], other[:, index])


def test_other_shares_are_refused() -> None:
    with pytest.raises(
        GraphError, match="guard rows: 1/3 is not supported; use one of 1, 1/2, 1/4, 1/8, 1/16"
    ):
        build_functions(SwsParameters(), FLOAT, TARGETS["tensorrt"], GuardOptions("fused", Fraction(1, 3)))

"""Tiled and dense transport against a matrix computed entry by entry."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from graph_passes.functions import build_functions
from graph_passes.functions.banded_transport import Tiles
from graph_passes.functions.building import Op, define_function
from graph_passes.functions.dense_transport import build_dense_transport
from graph_passes.guard import GuardOptions
from graph_passes.parameters import STATE_RADIUS, SwsParameters, diamond_offsets
from graph_passes.target import TARGETS
from tests.graph_passes.functions.calls import FLOAT, Array, Call

CHANNELS = 5
SHAPES = {
    "transport": ["batch", 145, "height", "width"],
    "k": ["batch", "tokens", CHANNELS],
    "v": ["batch", "tokens", CHANNELS],
}


@cache
def transport(dtype: ir.DataType = FLOAT) -> Call:
    return Call(
        build_functions(SwsParameters(), dtype, TARGETS["tensorrt"], GuardOptions()),
        "BandedTransport",
        SHAPES,
        dtype,
        {},
    )


@cache
def dense_transport(dtype: ir.DataType = FLOAT) -> Call:
    function = build_dense_transport(dtype, joined=True)
    return Call({function.name: function}, function.name, SHAPES, dtype, {})


@cache
def larger_tiles() -> Call:
    def body(op: Op, transport: Any, x: Any) -> Any:
        return Tiles(op, transport, FLOAT, 16).transported(x)

    function = define_function("Tiled", body, {"transport": FLOAT, "x": FLOAT}, ["y"])
    return Call({"Tiled": function}, "Tiled", {**SHAPES, "x": SHAPES["k"]}, FLOAT, {})


def random_band(height: int, width: int) -> Array:
    band = np.random.default_rng(0).random((2, 145, height, width), dtype=np.float32)
    for j, (dy, dx) in enumerate(diamond_offsets(STATE_RADIUS)):
        band[:, j] *= _inside(dy, dx, height, width)
    return band


def _inside(dy: int, dx: int, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Tokens whose neighbour at an offset is on the grid."""
    y, x = np.mgrid[:height, :width]
    return (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)


def dense(band: Array) -> Array:
    """[B, T, T], entry by entry."""
    batch, _, height, width = band.shape
    matrix = np.zeros((batch, height, width, height, width), np.float32)
    for j, (dy, dx) in enumerate(diamond_offsets(STATE_RADIUS)):
        y, x = np.nonzero(_inside(dy, dx, height, width))
        matrix[:, y, x, y + dy, x + dx] = band[:, j, y, x]
    return matrix.reshape(batch, height * width, height * width)


@pytest.mark.parametrize(
    ("height", "width"),
    [(8, 8), (16, 24), (1, 1), (1, 77), (7, 9), (12, 8), (25, 6), (17, 33), (3, 3)],
)
@pytest.mark.parametrize("form", [transport, dense_transport])
def test_equals_the_dense_product(height: int, width: int, form: Callable[[], Call]) -> None:
    band = random_band(height, width)
    k, v = np.random.default_rng(1).standard_normal((2, 2, height * width, CHANNELS), dtype=np.float32)
    k_perm, v_perm = form()(transport=band, k=k, v=v)
    np.testing.assert_allclose(k_perm, dense(band) @ k, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(v_perm, dense(band) @ v, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (17, 33), (3, 3)])
def test_tiles_of_another_size(height: int, width: int) -> None:
    band = random_band(height, width)
    x = np.random.default_rng(1).standard_normal((2, height * width, CHANNELS), dtype=np.float32)
    (moved,) = larger_tiles()(transport=band, x=x)
    np.testing.assert_allclose(moved, dense(band) @ x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", [transport, dense_transport])
def test_float16_tokens(form: Callable[[ir.DataType], Call]) -> None:
    band = random_band(9, 10) / 60
    k, v = np.random.default_rng(1).standard_normal((2, 2, 90, CHANNELS)).astype(np.float16)
    for moved, x in zip(form(ir.DataType.FLOAT16)(transport=band, k=k, v=v), (k, v), strict=True):
        assert moved.dtype == np.float16
        np.testing.assert_allclose(moved, dense(band) @ x.astype(np.float32), atol=5e-3)


def test_sites_of_a_grid_share_matrices_and_indices() -> None:
    """A second site on a grid costs nine nodes more than the first."""
    from graph_passes.clean_graph import CleanGraph
    from graph_passes.lower_functions import LowerFunctions

    function = build_functions(SwsParameters(), FLOAT, TARGETS["tensorrt"], GuardOptions())["BandedTransport"]

    def nodes(count: int) -> int:
        band = ir.Value(
            name="band", type=ir.TensorType(FLOAT), shape=ir.Shape(["batch", 145, "height", "width"])
        )
        pairs = [
            [
                ir.Value(name=f"{x}{i}", type=ir.TensorType(FLOAT), shape=ir.Shape(SHAPES[x]))
                for x in ("k", "v")
            ]
            for i in range(count)
        ]
        calls = [ir.node("BandedTransport", [band, *pair], domain="sws", num_outputs=2) for pair in pairs]
        outputs = [output for call in calls for output in call.outputs]
        for i, output in enumerate(outputs):
            output.name = f"y{i}"
            output.type = ir.TensorType(FLOAT)
        graph = ir.Graph(
            [band, *(x for pair in pairs for x in pair)],
            outputs,
            nodes=calls,
            opset_imports={"": 23, "sws": 1},
            name="two",
        )
        model = ir.Model(graph, ir_version=10, functions=[function])
        LowerFunctions()(model)
        CleanGraph()(model)
        return len(list(model.graph))

    # Concat, Gather, MatMul, Reshape, Gather, Split, and Shape and Concat of the Reshape.
    assert nodes(2) - nodes(1) == 9

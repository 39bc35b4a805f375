"""Transport by tiles, and as one product, against a matrix made entry by entry, on grids of all kinds."""

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from graph_passes.functions import build_functions
from graph_passes.functions.dense_transport import build_dense_transport
from graph_passes.parameters import STATE_RADIUS, SwsParameters, diamond_offsets
from tests.graph_passes.functions.calls import FLOAT, Array, Call

CHANNELS = 5


@cache
def transport(dtype: ir.DataType = FLOAT) -> Call:
    shapes = {"transport": ["batch", 145, "height", "width"], "x": ["batch", "tokens", CHANNELS]}
    return Call(build_functions(SwsParameters(), dtype), "BandedTransport", shapes, dtype, {})


@cache
def dense_transport(dtype: ir.DataType = FLOAT) -> Call:
    shapes = {"transport": ["batch", 145, "height", "width"], "x": ["batch", "tokens", CHANNELS]}
    function = build_dense_transport(dtype)
    return Call({function.name: function}, function.name, shapes, dtype, {})


def random_band(height: int, width: int) -> Array:
    band = np.random.default_rng(0).random((2, 145, height, width), dtype=np.float32)
    for j, (dy, dx) in enumerate(diamond_offsets(STATE_RADIUS)):
        band[:, j] *= _inside(dy, dx, height, width)
    return band


def _inside(dy: int, dx: int, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Which tokens an offset does not lead off the grid."""
    y, x = np.mgrid[:height, :width]
    return (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)


def dense(band: Array) -> Array:
    """[B, T, T], entry by entry as the contract says it."""
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
    x = np.random.default_rng(1).standard_normal((2, height * width, CHANNELS), dtype=np.float32)
    (moved,) = form()(transport=band, x=x)
    np.testing.assert_allclose(moved, dense(band) @ x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", [transport, dense_transport])
def test_float16_tokens(form: Callable[[ir.DataType], Call]) -> None:
    band = random_band(9, 10) / 60
    x = np.random.default_rng(1).standard_normal((2, 90, CHANNELS)).astype(np.float16)
    (moved,) = form(ir.DataType.FLOAT16)(transport=band, x=x)
    assert moved.dtype == np.float16
    np.testing.assert_allclose(moved, dense(band) @ x.astype(np.float32), atol=5e-3)


def test_sites_of_a_grid_share_matrices_and_indices() -> None:
    """A transport applied to two tensors costs six nodes more than applied to one."""
    from graph_passes.clean_graph import CleanGraph
    from graph_passes.lower_functions import LowerFunctions

    function = build_functions(SwsParameters(), FLOAT)["BandedTransport"]

    def nodes(count: int) -> int:
        band = ir.Value(
            name="band", type=ir.TensorType(FLOAT), shape=ir.Shape(["batch", 145, "height", "width"])
        )
        xs = [
            ir.Value(name=f"x{i}", type=ir.TensorType(FLOAT), shape=ir.Shape(["batch", "tokens", CHANNELS]))
            for i in range(count)
        ]
        calls = [ir.node("BandedTransport", [band, x], domain="sws") for x in xs]
        for i, call in enumerate(calls):
            call.outputs[0].name = f"y{i}"
            call.outputs[0].type = ir.TensorType(FLOAT)
        graph = ir.Graph(
            [band, *xs],
            [call.outputs[0] for call in calls],
            nodes=calls,
            opset_imports={"": 23, "sws": 1},
            name="two",
        )
        model = ir.Model(graph, ir_version=10, functions=[function])
        LowerFunctions()(model)
        CleanGraph()(model)
        return len(list(model.graph))

    # Gather, MatMul, Reshape, Gather, and Shape and Concat of the Reshape.
    assert nodes(2) - nodes(1) == 6

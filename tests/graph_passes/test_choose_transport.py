"""Small grids of static size get the dense product, others keep the tiles."""

import functools

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.choose_transport import ChooseTransport
from graph_passes.lower_functions import LowerFunctions
from graph_passes.set_static_shapes import SetStaticShapes
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import finished, graph_bytes, op_counts
from tests.graph_passes.test_insert_sws import inserted, sws_feeds, two_grids

SIZES = {"height": 8, "width": 12}
TILES, DENSE = "sws.BandedTransport", "sws.DenseTransport"


@functools.cache
def lowered(**sizes: int) -> ir.Model:
    """Two sites on the latent's grid and one on half of it; transports are function calls."""
    model = inserted(two_grids())
    SetStaticShapes(sizes)(model)
    LowerFunctions(frozenset({"BandedTransport"}))(model)
    return model


def opened(sizes: dict[str, int]) -> ir.Model:
    """A copy of the lowered model, which the test may change."""
    return lowered(**sizes).clone()


def calls(model: ir.Model) -> tuple[int, int]:
    counts = op_counts(model)
    return counts.get(TILES, 0), counts.get(DENSE, 0)


@pytest.mark.parametrize(
    ("limit", "left"), [(1024, (0, 3)), (96, (0, 3)), (95, (2, 1)), (24, (2, 1)), (23, (3, 0))]
)
def test_remaining_calls(limit: int, left: tuple[int, int]) -> None:
    model = opened(SIZES)
    assert ChooseTransport(limit)(model).modified == (left[1] > 0)
    assert calls(model) == left


def test_sites_of_a_grid_share_one_matrix() -> None:
    """Concat of keys and values, the product and Split a site; the rest once a grid."""
    grids = {}
    for names in (1, 2):
        taken = ("down_blocks", "up_blocks")[:names]
        model = inserted(two_grids(), lambda name, taken=taken: name.startswith(taken))
        SetStaticShapes(SIZES)(model)
        LowerFunctions(frozenset({"BandedTransport"}))(model)
        ChooseTransport()(model)
        grids[names] = op_counts(finished(model))
    assert {"Gather", "Pad"} <= grids[1].keys()
    # The weights of the blend's rows, the two axes of its mirror image, the places of the band's, and two for
    # the sides of the matrix.
    assert grids[1]["Gather"] == grids[2]["Gather"] == 6
    assert grids[1]["Pad"] == grids[2]["Pad"] == 1


def test_results_do_not_change(run_onnx: RunOnnx) -> None:
    tiles, dense = finished(opened(SIZES)), opened(SIZES)
    ChooseTransport()(dense)
    finished(dense)
    assert op_counts(tiles) != op_counts(dense)
    values = sws_feeds(tiles, height=8, width=12)
    expected, found = run_onnx(tiles, values), run_onnx(dense, values)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("sizes", [{}, {"height": 8}])
def test_a_grid_of_dynamic_size_keeps_its_tiles(sizes: dict[str, int]) -> None:
    model = opened(sizes)
    before = graph_bytes(model)
    assert not ChooseTransport()(model).modified
    assert graph_bytes(model) == before


def test_a_second_run_changes_nothing() -> None:
    model = opened(SIZES)
    ChooseTransport()(model)
    before = graph_bytes(model)
    assert not ChooseTransport()(model).modified
    assert graph_bytes(model) == before

"""Attention of sites with many tokens is partitioned into query chunks."""

from fractions import Fraction

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.guard import GuardOptions
from graph_passes.lower_functions import LowerFunctions
from graph_passes.parameters import SwsParameters
from graph_passes.set_static_shapes import SetStaticShapes
from graph_passes.split_query_chunks import SplitQueryChunks
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import finished, graph_bytes
from tests.graph_passes.test_insert_sws import inserted, sws_feeds, two_grids

SIZES = {"height": 8, "width": 12}
FOUR_CHUNKS = 8 * 12 * 8 * 12 // 4
"""Logits per chunk; the finer grid has four times as many, the coarser a quarter."""


def fused(sizes: dict[str, int], rows: Fraction | str = Fraction(1), cap: float = 0.3) -> ir.Model:
    """A site on a grid of 8 x 12 and one on 4 x 6, with branches, not yet lowered."""
    # Each step of the search adds branches of the same nodes.
    parameters = SwsParameters(key_cap=cap, kl_floor=1e-3, kl_slope=0.0, bisection_steps=2)
    model = inserted(
        two_grids(),
        take=lambda name: name.startswith(("down_blocks", "mid_block")),
        form="fused",
        rows=rows,
        target="onnxruntime",
        parameters=parameters,
    )
    SetStaticShapes(sizes)(model)
    return model


def test_the_functions_it_leaves() -> None:
    model = fused(SIZES)
    assert SplitQueryChunks(chunk_logits=FOUR_CHUNKS)(model).modified
    overloads = [node.overload for node in model.graph if node.op_type == "Attention" and node.domain]
    assert overloads == ["query_chunks_4", ""]
    split, whole = (model.functions["sws", "Attention", overload] for overload in ("query_chunks_4", ""))

    def count(function: ir.Function) -> int:
        return sum(node.op_type == "Attention" for node in function.all_nodes())

    assert count(split) == 4 * count(whole) > 0
    finished(model)
    assert not any(node.domain == "sws" for node in model.graph.all_nodes())


@pytest.mark.parametrize(
    ("rows", "logits"),
    [
        ("1", FOUR_CHUNKS * 4 // 7),
        ("kl:1/2", FOUR_CHUNKS),
        pytest.param("1/2", FOUR_CHUNKS, marks=pytest.mark.slow),
        pytest.param("1", FOUR_CHUNKS, marks=pytest.mark.slow),
        pytest.param("1/2", FOUR_CHUNKS * 4 // 7, marks=pytest.mark.slow),
    ],
)
def test_the_numbers_stay_the_same(run_onnx: RunOnnx, rows: str, logits: int) -> None:
    """Where the budget binds, with four parts and with seven, of which the last is the smallest."""
    whole, split = fused(SIZES, rows, cap=1.0), fused(SIZES, rows, cap=1.0)
    SplitQueryChunks(GuardOptions.parse("fused", rows).entropy_rows, logits)(split)
    LowerFunctions()(whole)
    finished(split)
    assert graph_bytes(whole) != graph_bytes(split)
    values = sws_feeds(whole, height=8, width=12)
    before, after = run_onnx(whole, values), run_onnx(split, values)
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    still = run_onnx(split, values | {"intensity": np.zeros_like(values["intensity"])})
    assert np.abs(still["out_sample"] - before["out_sample"]).max() > 1e-4


def test_the_guard_is_split_by_the_rows_that_it_sees() -> None:
    model = fused(SIZES, Fraction(1, 2))
    SplitQueryChunks(Fraction(1, 2), FOUR_CHUNKS)(model)
    site = model.functions["sws", "Attention", "query_chunks_4"]
    nodes = list(ir.traversal.RecursiveGraphIterator(site.graph))
    (guard,) = (node for node in nodes if node.op_type == "KeyGuard")
    assert guard.overload == "query_chunks_2"
    assert ("sws", "KeyGuard", "query_chunks_2") in model.functions
    # The site's own attention in four parts, with mixed keys and values and without.
    assert [node.op_type for node in nodes].count("Attention") == 2 * 4


def test_sites_of_dynamic_size_and_small_sites_are_not_split() -> None:
    for model in (fused({}), fused({"height": 8}), fused(SIZES)):
        before = graph_bytes(model)
        assert not SplitQueryChunks()(model).modified
        assert graph_bytes(model) == before


def test_a_second_run_changes_nothing() -> None:
    model = fused(SIZES)
    SplitQueryChunks(chunk_logits=FOUR_CHUNKS)(model)
    before = graph_bytes(model)
    assert not SplitQueryChunks(chunk_logits=FOUR_CHUNKS)(model).modified
    assert graph_bytes(model) == before

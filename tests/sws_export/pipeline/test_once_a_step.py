"""Nodes that do not depend on the site occur once per graph or grid, for any number of sites."""

import collections
from typing import Any

import onnx_ir as ir
import pytest

from graph_passes.guard import GuardForm, GuardOptions
from graph_passes.insert_sws import InsertSws
from graph_passes.parameters import SwsParameters
from graph_passes.target import TARGETS
from sws_export.pipeline.rewrite import rewrite
from sws_export.progress import SilentProgress
from tests.conftest import ShapesModel
from tests.graph_passes.small_models import SiteSpec, build_model, op_counts, site_name

SIZES = {"height": 8, "width": 12, "tokens": 5}
NAMES = {
    1: ["down_blocks.0", "up_blocks.1", "up_blocks.1.more", "down_blocks.0.more"],
    2: ["mid_block", "up_blocks.0", "down_blocks.1"],
}
SITES = ("down_blocks.*.attn1", "mid_block.*.attn1")
"""Of the example: one on the grid d2 and two on d4."""
# The search repeats the same nodes for each step; one step is enough to count them.
PARAMETERS = SwsParameters(bisection_steps=1)
# Transport, its momentum and the schedule are made of these, a site of none.
ONCE_A_GRID = ("Conv", "ConvTranspose")
ON_TOKENS = {"Conv", "ConvTranspose", "Range", "Expand", "Reciprocal", "ReduceProd"}


def sizes_and_targets(static: dict[str, int]) -> list[Any]:
    """Each target, and dynamic and static shapes, in default tests; all combinations in slow ones."""
    return [
        ({}, "onnxruntime"),
        (static, "tensorrt-rtx"),
        pytest.param(static, "onnxruntime", marks=pytest.mark.slow),
        pytest.param({}, "tensorrt-rtx", marks=pytest.mark.slow),
    ]


def finished(
    factors: list[int], sizes: dict[str, int], target: str = "onnxruntime", guard: GuardForm = "fused"
) -> ir.Model:
    """A graph with a site for each downsampling factor."""
    names = {factor: iter(paths) for factor, paths in NAMES.items()}
    specs = [SiteSpec(name=site_name(next(names[factor])), factor=factor) for factor in factors]
    model = build_model(specs, levels=2)
    rewrite(
        model,
        PARAMETERS,
        (),
        GuardOptions(guard),
        TARGETS[target],
        SilentProgress(),
        sizes=sizes,
    )
    return model


def all_counts(model: ir.Model) -> collections.Counter[str]:
    """Nodes of each type, those of branches too."""
    return collections.Counter(node.op_type for node in model.graph.all_nodes())


@pytest.mark.parametrize(("sizes", "target"), sizes_and_targets(SIZES))
def test_another_site_adds_no_transport(sizes: dict[str, int], target: str) -> None:
    two, three, four = (all_counts(finished([1] * count, sizes, target)) for count in (2, 3, 4))
    assert two["Conv"] > 0
    # With dynamic shapes the branchless guard makes the indices of some of the query rows at each site.
    own = set() if sizes or TARGETS[target].branches else {"Range"}
    for op_type in ON_TOKENS - own:
        assert two[op_type] == three[op_type] == four[op_type], op_type
    # What a third and a fourth site add is the same, to the node.
    assert three - two == four - three


@pytest.mark.parametrize("sizes", [{}, SIZES])
def test_another_grid_adds_a_transport_and_no_schedule(sizes: dict[str, int]) -> None:
    """Neither is a part of the guard, whose literal form has the fewest nodes."""
    one, model = (finished(factors, sizes, guard="literal") for factors in ([1], [1, 2, 2]))
    for op_type in ONCE_A_GRID:
        assert all_counts(model)[op_type] == 2 * all_counts(one)[op_type] > 0
    sigma = next(value for value in model.graph.inputs if value.name == "sigma")
    assert [node.op_type for node in sigma.consumers()] == ["Log"]


@pytest.mark.parametrize("sizes", [{}, SIZES])
def test_blend_and_momentum_occur_once_per_grid(sizes: dict[str, int]) -> None:
    model = finished([1, 1, 2], sizes, guard="literal")
    states = [value for value in model.graph.inputs if str(value.name).startswith("sws_state")]
    assert len(states) == 2
    for state in states:
        assert [node.op_type for node in state.consumers() if node.op_type != "Shape"] == ["Mul"]
    (weights,) = (node for node in model.graph if node.op_type == "Gather" and "blend" in str(node.inputs[0]))
    (spread,) = weights.outputs[0].consumers()
    (matrix,) = spread.outputs[0].consumers()
    assert [node.op_type for node in matrix.outputs[0].consumers()] == ["MatMul", "MatMul"]


@pytest.mark.parametrize(("sizes", "target"), sizes_and_targets({"height": 32, "width": 32, "tokens": 77}))
def test_no_node_is_unused_or_duplicate(
    shapes_model: ShapesModel, sizes: dict[str, int], target: str
) -> None:
    """The example in float16, whose statistics are float32: no Cast is repeated or reverted."""
    model = shapes_model("fp16")
    guard = GuardOptions("fused")
    rewrite(model, PARAMETERS, SITES, guard, TARGETS[target], SilentProgress(), sizes=sizes)
    casts = collections.Counter()
    for node in model.graph.all_nodes():
        assert any(value.uses() or value.is_graph_output() for value in node.outputs), node.name
        if node.op_type == "Cast":
            casts[node.inputs[0], node.attributes["to"].value] += 1
            source = node.inputs[0].producer() if node.inputs[0] is not None else None
            assert source is None or source.op_type != "Cast", node.name
    assert casts
    assert max(casts.values()) == 1
    for value in model.graph.initializers.values():
        assert value.uses(), value.name


def test_the_plain_graph_has_none_of_these_nodes() -> None:
    """The nodes counted above belong to SWS."""
    model = build_model([SiteSpec()])
    assert not ON_TOKENS & op_counts(model).keys()
    assert not InsertSws([], SwsParameters(), TARGETS["tensorrt"], GuardOptions())(model).modified

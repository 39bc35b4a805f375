"""Passes in a wrong order, and passes that leave what they should remove, end with an error."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import InPlacePass, PostconditionError, PreconditionError

from graph_passes.choose_transport import ChooseTransport
from graph_passes.clean_graph import CleanGraph
from graph_passes.insert_qdq import InsertQdq
from graph_passes.match_ranks import MatchRanks
from graph_passes.quantize_weights import QuantizeWeights
from graph_passes.recognize_attention import RecognizeAttention
from graph_passes.set_static_shapes import SetStaticShapes
from graph_passes.sink_into_branches import SinkIntoBranches
from graph_passes.slices_to_pads import SlicesToPads
from graph_passes.upcast_bfloat16 import UpcastBfloat16
from graph_passes.upgrade_opset import UpgradeOpset
from tests.graph_passes.small_models import FLOAT, SiteSpec, build_model
from tests.graph_passes.test_insert_sws import inserted, two_grids


def plain() -> ir.Model:
    return build_model([SiteSpec()])


def with_sws() -> ir.Model:
    return inserted(two_grids())


def old_opset() -> ir.Model:
    model = plain()
    model.graph.opset_imports[""] = 22
    return model


def with_bfloat16() -> ir.Model:
    model = plain()
    model.graph[3].outputs[0].dtype = ir.DataType.BFLOAT16
    return model


def with_constant() -> ir.Model:
    model = plain()
    one = ir.node("Constant", [], {"value": ir.tensor(np.ones(1, np.float32))}, name="one")
    total = ir.node("Add", [model.graph.inputs[0], one.outputs[0]])
    one.outputs[0].name, total.outputs[0].name = "one", "total"
    model.graph.extend([one, total])
    model.graph.outputs.append(total.outputs[0])
    return model


def with_branch_initializer() -> ir.Model:
    """An If whose branch has an initializer of its own."""
    model = plain()
    value = ir.val("inner", const_value=ir.tensor(np.ones(1, np.float32), name="inner"))
    (out,) = (node := ir.node("Neg", [value])).outputs
    out.name, out.type = "negated", ir.TensorType(FLOAT)
    branch = ir.Graph([], [out], nodes=[node], initializers=[value], name="branch")
    chosen = ir.node("If", [model.graph.inputs[0]], {"then_branch": branch})
    chosen.outputs[0].name = "chosen"
    model.graph.append(chosen)
    model.graph.outputs.append(chosen.outputs[0])
    return model


@pytest.mark.parametrize(
    ("checked", "model", "message"),
    [
        (ChooseTransport(), with_sws, r"sws\.Schedule is not lowered"),
        (SinkIntoBranches(), with_sws, r"sws\.Schedule is not lowered"),
        (MatchRanks(), with_constant, "node one: a Constant is not an initializer"),
        (SlicesToPads(), with_constant, "node one: a Constant is not an initializer"),
        (RecognizeAttention(), old_opset, "expected opset 23 or later, found 22"),
        (QuantizeWeights("int8"), with_sws, "the graph has SWS already"),
        (InsertQdq("int8", {}), with_sws, "the graph has SWS already"),
    ],
)
def test_preconditions(checked: InPlacePass, model: Callable[[], ir.Model], message: str) -> None:
    with pytest.raises(PreconditionError, match=message):
        checked(model())


def test_sws_needs_an_opset_with_attention() -> None:
    model = two_grids()
    model.graph.opset_imports[""] = 22
    with pytest.raises(PreconditionError, match="expected opset 23 or later, found 22"):
        inserted(model)


@pytest.mark.parametrize(
    ("checked", "model", "message"),
    [
        (UpgradeOpset(23), old_opset, "expected opset 23 after the conversion, found 22"),
        (UpcastBfloat16(), with_bfloat16, "is bfloat16 after upcasting"),
        (SetStaticShapes({"height": 8}), plain, "input sample: dimension height is not static"),
        (CleanGraph(), with_constant, "node one: a Constant is left"),
        (CleanGraph(), with_branch_initializer, "initializer inner is in a branch"),
        (CleanGraph(), plain, "node down_blocks.0.resnets.0/Neg: none of its outputs is used"),
    ],
)
def test_postconditions(checked: InPlacePass, model: Callable[[], ir.Model], message: str) -> None:
    """Each pass repairs such a graph, and its postcondition is what notices one that it does not."""
    with pytest.raises(PostconditionError, match=message):
        checked.ensures(model())
    checked.ensures(checked(model()).model)

"""Passes in a wrong order, and passes that leave what they should remove, end with an error."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import InPlacePass, PostconditionError, PreconditionError

from graph_passes.choose_guard import ChooseGuard
from graph_passes.choose_transport import ChooseTransport
from graph_passes.clean_graph import CleanGraph
from graph_passes.decompose_metrics_attention import DecomposeMetricsAttention
from graph_passes.fold_constants import FoldConstants
from graph_passes.insert_qdq import InsertQdq
from graph_passes.match_ranks import MatchRanks
from graph_passes.mix_before_projections import MixBeforeProjections
from graph_passes.name_attention import NameAttention
from graph_passes.name_ldm_nodes import NameLdmNodes
from graph_passes.name_nodes import NameNodes
from graph_passes.quantize_weights import QuantizeWeights
from graph_passes.recognize_attention import RecognizeAttention
from graph_passes.set_static_shapes import SetStaticShapes
from graph_passes.sink_into_branches import SinkIntoBranches
from graph_passes.slices_to_pads import SlicesToPads
from graph_passes.split_query_chunks import SplitQueryChunks
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


def with_metrics() -> ir.Model:
    return inserted(two_grids(), target="tensorrt-rtx", debug_outputs=True)


def with_static_sites() -> ir.Model:
    model = with_sws()
    SetStaticShapes({"height": 8, "width": 12})(model)
    return model


def with_block_of_original_layout() -> ir.Model:
    model = plain()
    model.graph[0].name = "/unet/input_blocks.1.1/proj_in/Conv"
    return model


def with_equal_names() -> ir.Model:
    """Two nodes of one module that have one name."""
    model = plain()
    for node in model.graph[1], model.graph[2]:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'unet.mid_block', 'x']"
        node.name = "mid_block/x"
    return model


@pytest.mark.parametrize(
    ("checked", "model", "message"),
    [
        (ChooseTransport(), with_sws, r"sws\.Schedule is not lowered"),
        (SinkIntoBranches(), with_sws, r"sws\.Schedule is not lowered"),
        (FoldConstants(), with_sws, r"sws\.Schedule is not lowered"),
        (NameAttention(), with_sws, r"sws\.Schedule is not lowered"),
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
        (DecomposeMetricsAttention(), with_metrics, r"Attention nodes are left in sws\.SiteMetrics"),
        (SplitQueryChunks(chunk_logits=1000), with_static_sites, "its query rows are not partitioned"),
        (NameAttention(), plain, r"not called as sws\.TRT_Attention"),
        (NameLdmNodes(), with_block_of_original_layout, "named after a block of the original layout"),
        (NameNodes(), with_equal_names, "two nodes have the name mid_block/x"),
    ],
)
def test_postconditions(checked: InPlacePass, model: Callable[[], ir.Model], message: str) -> None:
    """Each pass repairs such a graph, and its postcondition is what notices one that it does not."""
    with pytest.raises(PostconditionError, match=message):
        checked.ensures(model())
    checked.ensures(checked(model()).model)


@pytest.mark.parametrize("checked", [ChooseGuard({}), MixBeforeProjections(), SplitQueryChunks()])
@pytest.mark.parametrize("function", ["Attention", "KeyGuard"])
def test_functions_that_are_called_are_defined(checked: InPlacePass, function: str) -> None:
    """Those that a site calls and those that a function calls."""
    model = with_sws()
    checked.ensures(model)
    del model.functions["sws", function, ""]
    with pytest.raises(PostconditionError, match=rf"the model has no function sws\.{function}"):
        checked.ensures(model)

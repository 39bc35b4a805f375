"""The graph passes on the traced example: a float16 UNet with sites on two grids and attention over text."""

import numpy as np
import onnx
import onnx_ir as ir

from graph_passes.clean_graph import CleanGraph
from graph_passes.find_sites import find_sites
from graph_passes.fold_constants import FoldConstants
from graph_passes.guard import GuardOptions
from graph_passes.lower_functions import LowerFunctions
from graph_passes.name_nodes import NameNodes
from graph_passes.pads_to_concats import PadsToConcats
from graph_passes.parameters import SwsParameters
from graph_passes.remove_ordering import RemoveOrdering
from graph_passes.set_static_shapes import SetStaticShapes
from graph_passes.split_reductions import SplitReductions
from graph_passes.target import TARGETS
from graph_passes.upcast_bfloat16 import UpcastBfloat16
from sws_export.pipeline.rewrite import rewrite
from sws_export.progress import SilentProgress
from tests.conftest import RunOnnx, ShapesModel
from tests.graph_passes.small_models import op_counts, site_name
from tests.graph_passes.test_fold_constants import ON_SIZES
from tests.graph_passes.test_insert_sws import inserted

ONE_A_GRID = ("down_blocks.1", "mid_block")
SITES = ("down_blocks.*.attn1",)
"""One site of each grid, where whole graphs are made: all sites are alike."""


def one_site_a_grid(name: str) -> bool:
    """Whether a site has SWS: its graph is made in a third of the time of all seven."""
    return name.startswith(ONE_A_GRID)


def weights(model: ir.Model) -> set[str]:
    return {name for name in model.graph.initializers if name.endswith((".weight", ".bias"))}


def test_sites(shapes_model: ShapesModel) -> None:
    sites, skipped = find_sites(shapes_model("fp16"))
    assert {site.name: (site.factor, site.heads) for site in sites} == {
        site_name("down_blocks.1"): (2, 2),
        site_name("down_blocks.2"): (4, 3),
        site_name("mid_block"): (4, 3),
        site_name("up_blocks.0"): (4, 3),
        "up_blocks.0.attentions.1.transformer_blocks.0.attn1": (4, 3),
        site_name("up_blocks.1"): (2, 2),
        "up_blocks.1.attentions.1.transformer_blocks.0.attn1": (2, 2),
    }
    assert [skip.name for skip in skipped] == [site.name.replace("attn1", "attn2") for site in sites]
    assert {skip.reason.partition(":")[0] for skip in skipped} == {"cross-attention"}


def test_node_names_are_unique(shapes_model: ShapesModel) -> None:
    model = shapes_model("fp16")
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    attention = [node.name for node in model.graph if node.op_type == "Attention"]
    assert attention[:2] == [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1/Attention",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2/Attention",
    ]
    assert not NameNodes()(model).modified


def test_all_sites_inserted_lowered_and_cleaned(shapes_model: ShapesModel) -> None:
    """One state per grid; standard operators only; all weights of the checkpoint."""
    model = inserted(shapes_model("fp16"))
    before = weights(model)
    counts = op_counts(model)
    assert {name: counts[name] for name in counts if name.startswith("sws.")} == {
        "sws.Schedule": 1,
        "sws.Transport": 2,
        "sws.Attention": 7,
    }
    assert [(value.name, value.dtype) for value in model.graph.outputs] == [
        ("out_sample", ir.DataType.FLOAT16),
        ("sws_state_d2_out", ir.DataType.FLOAT),
        ("sws_state_d4_out", ir.DataType.FLOAT),
    ]
    LowerFunctions()(model)
    assert {node.domain for node in model.graph} == {""}
    # 14 of the plain export, 7 of which the clean-up removes, and those of the 7 sites with SWS.
    assert op_counts(model)["Attention"] == 21
    CleanGraph()(model)
    assert op_counts(model)["Attention"] == 14
    assert before <= weights(model)
    assert not CleanGraph()(model).modified


def test_static_shapes_are_folded_and_weights_are_kept(shapes_model: ShapesModel) -> None:
    model = shapes_model("fp16")
    before = weights(model)
    inserted(model, one_site_a_grid)
    SetStaticShapes({"height": 32, "width": 32, "tokens": 77})(model)
    LowerFunctions()(model)
    FoldConstants()(model)
    CleanGraph()(model)
    assert before <= weights(model)
    assert not ON_SIZES - {"Min"} & op_counts(model).keys()


def with_branches(model: ir.Model) -> ir.Model:
    """The example with the fused guard at one site of each grid, lowered and cleaned."""
    # Each step of the search adds branches of the same nodes.
    parameters = SwsParameters(bisection_steps=2)
    inserted(model, one_site_a_grid, form="fused", target="onnxruntime", parameters=parameters)
    assert op_counts(model)["sws.Attention"] == len(ONE_A_GRID)
    LowerFunctions()(model)
    CleanGraph()(model)
    return model


def test_branches_in_float16_are_valid_onnx(shapes_model: ShapesModel) -> None:
    """With casts to the float32 of the statistics."""
    onnx.checker.check_model(ir.to_proto(with_branches(shapes_model("fp16"))), full_check=True)


def test_the_float32_copy_has_bfloat16_weights_only(shapes_model: ShapesModel) -> None:
    model = with_branches(shapes_model("bf16"))
    bfloat16 = ir.DataType.BFLOAT16
    assert any(value.dtype == bfloat16 for value in model.graph.initializers.values())
    UpcastBfloat16()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    casts = [node for node in model.graph.all_nodes() if node.op_type == "Cast"]
    assert all(node.attributes["to"].value != bfloat16 for node in casts)
    values = [value for node in model.graph.all_nodes() for value in node.outputs]
    assert all(value.dtype != bfloat16 for value in values)
    weights = [value for value in model.graph.initializers.values() if value.dtype == bfloat16]
    assert weights
    assert all(node.op_type == "Cast" for value in weights for node in value.consumers())


def test_a_graph_for_the_cuda_provider(shapes_model: ShapesModel) -> None:
    """On a grid that is not square: no stored product of all tokens, and no node that the passes replace."""
    model, sizes = shapes_model("fp16"), {"height": 96, "width": 72, "batch": 2}
    guard, target = GuardOptions("fused"), TARGETS["onnxruntime-cuda"]
    rewrite(model, SwsParameters(), SITES, guard, target, SilentProgress(), sizes=sizes)
    assert not {"If", "Softmax", "Einsum"} & op_counts(model).keys()
    for replaces in (RemoveOrdering(), SplitReductions(), PadsToConcats()):
        assert not replaces(model).modified


def test_materialized_logits_and_fused_attention_give_the_same_output(
    shapes_model: ShapesModel, run_onnx: RunOnnx
) -> None:
    """With float16 attention as ONNX Runtime computes it, in float32."""
    outputs = []
    for largest in ({}, {"height": 32, "width": 32}):
        model = shapes_model("fp16")
        guard, target = GuardOptions("fused"), TARGETS["tensorrt-rtx"]
        rewrite(model, SwsParameters(), SITES, guard, target, SilentProgress(), largest=largest)
        outputs.append(run_onnx(model, shapes_feeds(model))["out_sample"].astype(np.float64))
    assert np.abs(outputs[0] - outputs[1]).max() < 5e-3 * np.abs(outputs[0]).max()


def shapes_feeds(model: ir.Model) -> dict[str, np.ndarray]:
    """Two samples that differ, on a grid that is not square."""
    rng = np.random.default_rng(0)
    known = {"batch": 2, "height": 24, "width": 32, "tokens": 8}
    values: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        dims = []
        for dim in value.shape:
            name, _, divisor = str(dim.value if isinstance(dim, ir.SymbolicDim) else dim).partition("/")
            dims.append(known.get(name) or int(name))
            dims[-1] //= int(divisor or 1)
        values[str(value.name)] = rng.standard_normal(dims).astype(value.dtype.numpy())
    zeros = {name: 0 * array for name, array in values.items() if name.startswith("sws_state")}
    levels = {"sigma": [6.0, 1.5], "intensity": [1.0, 0.5], "timestep": [700, 300]}
    return values | zeros | {name: np.array(level, values[name].dtype) for name, level in levels.items()}

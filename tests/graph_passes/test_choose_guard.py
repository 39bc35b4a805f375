"""Sites with few tokens store float32 logits, all others use fused float16 attention."""

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.choose_guard import STORED_TOKENS, ChooseGuard
from graph_passes.functions import DOMAIN, STORED_LOGITS
from graph_passes.guard import GuardOptions
from graph_passes.parameters import SwsParameters
from graph_passes.target import TARGETS
from sws_export.pipeline.rewrite import rewrite
from sws_export.progress import SilentProgress
from tests.conftest import RunOnnx, ShapesModel
from tests.graph_passes.small_models import op_counts
from tests.graph_passes.test_insert_sws import inserted, two_grids

SITES = ("down_blocks.*.attn1",)
"""One site of each grid, where whole graphs are made: all sites are alike."""


def chosen(model: ir.Model, largest: dict[str, int], target: str = "tensorrt-rtx") -> list[str]:
    """The overload of each site of the example: three on half of the latent's grid, four on a quarter."""
    model = inserted(model, form="fused", target=target)
    ChooseGuard(largest)(model)
    return [node.overload for node in model.graph if (node.domain, node.op_type) == (DOMAIN, "Attention")]


@pytest.mark.parametrize(("side", "fused"), [(32, 0), (36, 3), (72, 7)])
def test_a_site_chooses_by_its_tokens(shapes_model: ShapesModel, side: int, fused: int) -> None:
    """At the largest sizes of dynamic shapes."""
    overloads = chosen(shapes_model("fp16"), {"height": side, "width": side - 4})
    assert ((side - 4) * side // 4 > STORED_TOKENS) == (fused > 0)
    assert (overloads.count(""), overloads.count(STORED_LOGITS)) == (fused, 7 - fused)


def test_unknown_sizes_use_fused_attention(shapes_model: ShapesModel) -> None:
    assert chosen(shapes_model("fp16"), {}) == [""] * 7


def test_no_product_of_all_tokens_is_stored(shapes_model: ShapesModel) -> None:
    """On a grid that is not square."""
    model, sizes = shapes_model("fp16"), {"height": 96, "width": 72, "batch": 2}
    guard, target = GuardOptions("fused"), TARGETS["onnxruntime-cuda"]
    rewrite(model, SwsParameters(), SITES, guard, target, SilentProgress(), sizes=sizes)
    assert not {"If", "Softmax", "Einsum"} & op_counts(model).keys()


def test_a_float32_model_and_other_targets_have_no_choice() -> None:
    for target in TARGETS:
        model = inserted(
            two_grids(), form="fused", target=target, parameters=SwsParameters(bisection_steps=1)
        )
        assert not ChooseGuard({"height": 8, "width": 8})(model).modified


def test_a_second_run_changes_nothing(shapes_model: ShapesModel) -> None:
    model = inserted(shapes_model("fp16"), form="fused", target="tensorrt-rtx")
    choose = ChooseGuard({"height": 32, "width": 32})
    assert choose(model).modified
    functions = set(model.functions)
    assert not choose(model).modified
    assert set(model.functions) == functions


def test_both_forms_agree(shapes_model: ShapesModel, run_onnx: RunOnnx) -> None:
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

"""Sites with few tokens materialize float32 logits, all others use fused float16 attention."""

import onnx_ir as ir
import pytest

from graph_passes.choose_guard import MATERIALIZED_TOKENS, ChooseGuard
from graph_passes.functions import DOMAIN, MATERIALIZED_LOGITS
from graph_passes.parameters import SwsParameters
from tests.conftest import ShapesModel
from tests.graph_passes.test_insert_sws import inserted, two_grids


def chosen(model: ir.Model, largest: dict[str, int], target: str = "tensorrt-rtx") -> list[str]:
    """The overload of each site of the example: three on half of the latent's grid, four on a quarter."""
    model = inserted(model, form="fused", target=target)
    ChooseGuard(largest)(model)
    return [node.overload for node in model.graph if (node.domain, node.op_type) == (DOMAIN, "Attention")]


@pytest.mark.parametrize(("side", "fused"), [(32, 0), (36, 3), (72, 7)])
def test_a_site_chooses_by_its_tokens(shapes_model: ShapesModel, side: int, fused: int) -> None:
    """At the largest sizes of dynamic shapes."""
    overloads = chosen(shapes_model("fp16"), {"height": side, "width": side - 4})
    assert ((side - 4) * side // 4 > MATERIALIZED_TOKENS) == (fused > 0)
    assert (overloads.count(""), overloads.count(MATERIALIZED_LOGITS)) == (fused, 7 - fused)


def test_unknown_sizes_use_fused_attention(shapes_model: ShapesModel) -> None:
    assert chosen(shapes_model("fp16"), {}) == [""] * 7


def test_a_float32_model_has_no_choice() -> None:
    model = inserted(two_grids(), form="fused", target="tensorrt-rtx")
    assert not ChooseGuard({"height": 8, "width": 8})(model).modified


def test_a_target_without_float16_attention_has_no_choice(shapes_model: ShapesModel) -> None:
    model = shapes_model("fp16")
    inserted(model, form="fused", target="onnxruntime", parameters=SwsParameters(bisection_steps=1))
    assert not ChooseGuard({"height": 8, "width": 8})(model).modified


def test_a_second_run_changes_nothing(shapes_model: ShapesModel) -> None:
    model = inserted(shapes_model("fp16"), form="fused", target="tensorrt-rtx")
    choose = ChooseGuard({"height": 32, "width": 32})
    assert choose(model).modified
    functions = set(model.functions)
    assert not choose(model).modified
    assert set(model.functions) == functions

"""Static sizes replace symbols in every shape; nothing else changes."""

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.lower_functions import LowerFunctions
from graph_passes.set_static_shapes import SetStaticShapes
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import float_input, graph_bytes, op_counts
from tests.graph_passes.test_insert_sws import inserted, sws_feeds, two_grids

SIZES = {"height": 4, "width": 6, "tokens": 5}


def shapes(model: ir.Model) -> dict[str | None, str]:
    return {value.name: str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)}


def graph_with(dim: str | int | None) -> ir.Model:
    x = float_input("x", [2, 3])
    x.shape = ir.Shape([dim])
    node = ir.node("Neg", [x])
    node.outputs[0].name = "y"
    return ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23}), ir_version=10)


def test_remaining_shapes() -> None:
    model = inserted(two_grids())
    before = op_counts(model)
    assert SetStaticShapes(SIZES)(model).modified
    assert op_counts(model) == before
    found = shapes(model)
    assert found["sample"] == "[batch,8,4,6]"
    assert found["encoder_hidden_states"] == "[batch,5,8]"
    assert found["sws_state_d1"] == found["sws_state_d1_out"] == "[batch,145,4,6]"
    assert found["sws_state_d2"] == found["sws_state_d2_out"] == "[batch,145,2,3]"


def test_results_do_not_change_and_other_sizes_are_refused(run_onnx: RunOnnx) -> None:
    model = inserted(two_grids())
    LowerFunctions()(model)
    feeds = sws_feeds(model, batch=3)
    expected = run_onnx(model, feeds)
    SetStaticShapes(SIZES)(model)
    for name, value in run_onnx(model, feeds).items():
        np.testing.assert_array_equal(value, expected[name])
    with pytest.raises(Exception, match="invalid dimensions"):
        run_onnx(model, sws_feeds(model, height=8))


@pytest.mark.parametrize(
    ("dim", "fixed"),
    [("height*width/8", "3"), ("2*height", "8"), ("tokens", "5"), ("width/2", "3")],
)
def test_expressions(dim: str, fixed: str) -> None:
    model = graph_with(dim)
    SetStaticShapes(SIZES)(model)
    assert shapes(model)["x"] == f"[{fixed}]"


@pytest.mark.parametrize(
    "dim", ["batch", "batch*height", "height/3", "heights", "height+1", "height/width", 7, None]
)
def test_unspecified_sizes_stay_dynamic(dim: str | int | None) -> None:
    model = graph_with(dim)
    before = graph_bytes(model)
    assert not SetStaticShapes(SIZES)(model).modified
    assert graph_bytes(model) == before


def test_a_second_run_changes_nothing() -> None:
    model = inserted(two_grids())
    SetStaticShapes(SIZES)(model)
    before = graph_bytes(model)
    assert not SetStaticShapes(SIZES)(model).modified
    assert graph_bytes(model) == before

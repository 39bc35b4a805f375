"""Sites with many tokens transport the input of their projections."""

from collections.abc import Callable

import onnx_ir as ir
import pytest

from graph_passes.functions import DOMAIN, MATERIALIZED_LOGITS
from graph_passes.mix_before_projections import MixBeforeProjections
from graph_passes.set_static_shapes import SetStaticShapes
from tests.conftest import ShapesModel
from tests.graph_passes.small_models import graph_bytes
from tests.graph_passes.test_insert_sws import inserted


def sites(model: ir.Model) -> tuple[int, int]:
    """Calls of `sws.Attention` and of `sws.ProjectedAttention`."""
    kinds = [node.op_type for node in model.graph if node.domain == DOMAIN]
    return kinds.count("Attention"), kinds.count("ProjectedAttention")


def opened(shapes_model: ShapesModel, sizes: dict[str, int], target: str = "tensorrt-rtx") -> ir.Model:
    """The example: three sites on half of the latent's grid and four on a quarter."""
    model = inserted(shapes_model("fp16"), form="fused", target=target)
    SetStaticShapes(sizes)(model)
    return model


@pytest.mark.parametrize(("side", "left"), [(None, (0, 7)), (64, (7, 0)), (68, (4, 3)), (132, (0, 7))])
def test_sites_of_many_tokens(shapes_model: ShapesModel, side: int | None, left: tuple[int, int]) -> None:
    """Where shapes are dynamic, all; else those of more than 1024 tokens."""
    model = opened(shapes_model, {"height": side, "width": side} if side else {})
    assert MixBeforeProjections()(model).modified == (left[1] > 0)
    assert sites(model) == left
    before = graph_bytes(model)
    assert not MixBeforeProjections()(model).modified
    assert graph_bytes(model) == before


def add(node: ir.Node, index: int) -> None:
    """Add something to keys or values."""
    summed = ir.node("Add", [node.inputs[index], node.inputs[0]])
    assert node.graph is not None
    node.graph.insert_before(node, summed)
    node.replace_input_with(index, summed.outputs[0])


def biased_keys(node: ir.Node) -> None:
    add(node, 1)


def biased_values(node: ir.Node) -> None:
    add(node, 2)


def stored(node: ir.Node) -> None:
    node.overload = MATERIALIZED_LOGITS


@pytest.mark.parametrize("change", [biased_keys, biased_values, stored])
def test_near_misses_are_not_changed(shapes_model: ShapesModel, change: Callable[[ir.Node], None]) -> None:
    """Keys or values that are not a product, a guard that materializes its logits."""
    model = opened(shapes_model, {})
    change(next(node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, "Attention")))
    # Without the conditions: the model has no function for a guard that materializes its logits.
    MixBeforeProjections().call(model)
    assert sites(model) == (1, 6)


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_plugins_and_branches_keep_their_sites(shapes_model: ShapesModel, target: str) -> None:
    assert not MixBeforeProjections()(opened(shapes_model, {}, target)).modified

"""Which layers are found, and which of them keep their precision."""

import onnx_ir as ir

from graph_passes.find_layers import find_layers
from tests.graph_passes.layer_models import QUANTIZED, SKIPPED, layer_model
from tests.graph_passes.small_models import SiteSpec, build_model, graph_bytes


def test_layers_with_the_axis_of_their_channels() -> None:
    layers, _ = find_layers(layer_model())
    assert {layer.name: layer.axis for layer in layers} == QUANTIZED
    assert {layer.name: layer.weight.name for layer in layers} == {
        name: f"{name}.weight" for name in QUANTIZED
    }


def test_layers_that_keep_their_precision() -> None:
    model = layer_model()
    before = graph_bytes(model)
    _, skipped = find_layers(model)
    assert {layer.name: layer.reason for layer in skipped} == SKIPPED
    assert graph_bytes(model) == before


def test_small_weights_and_integers_are_no_layers_to_quantize() -> None:
    layers, skipped = find_layers(build_model([SiteSpec()]))
    assert not layers
    assert {layer.reason for layer in skipped} == {"fewer than 4096 weights"}
    model = layer_model()
    weight = model.graph.initializers["mid_block.to_k.weight"]
    weight.const_value = ir.tensor(weight.const_value.numpy().astype("int32"))  # type: ignore[union-attr]
    weight.dtype = ir.DataType.INT32
    layers, skipped = find_layers(model)
    assert "mid_block.to_k" not in {layer.name for layer in (*layers, *skipped)}

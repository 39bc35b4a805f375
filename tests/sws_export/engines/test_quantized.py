"""Engines of graphs with 8 bits, built by TensorRT for RTX."""

from pathlib import Path

import onnx_ir as ir
import pytest

from graph_passes.insert_qdq import InsertQdq
from graph_passes.quantize_weights import QuantizeWeights
from graph_passes.weight_formats import WeightFormat
from sws_export.engines.backend import BuildOptions
from sws_export.engines.build import EngineReport, build_engine
from sws_export.engines.choice import get_backend
from sws_export.errors import EngineError
from sws_export.tensors import Shape
from tests.graph_passes.layer_models import QUANTIZED, WIDTH, layer_model

SHAPES = {"sample": (2, 4, 8, 8), "timestep": (2, WIDTH), "encoder_hidden_states": (2, WIDTH, WIDTH)}
TARGETS = ("8.9", "12.0")


def build(folder: Path, model: ir.Model, targets: tuple[str, ...]) -> EngineReport:
    ir.save(model, folder / "model.onnx")
    shapes: dict[str, tuple[Shape, Shape, Shape]] = {name: (shape,) * 3 for name, shape in SHAPES.items()}
    options = BuildOptions(get_backend("tensorrt-rtx"), compute_capabilities=targets)
    return build_engine(folder / "model.onnx", folder / "engine.plan", [shapes], options)


@pytest.mark.parametrize(("weights", "activations"), [("int8", False), ("int8", True), ("fp8", True)])
def test_engines_hold_8_bit_weights(weights: WeightFormat, activations: bool, tmp_path: Path) -> None:
    model = layer_model(ir.DataType.FLOAT16)
    exact = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if activations:
        InsertQdq(weights, dict.fromkeys(QUANTIZED, 3.0))(model)
    QuantizeWeights(weights)(model)
    report = build(tmp_path, model, TARGETS)
    assert report.compute_capabilities == TARGETS
    assert report.gpu_memory is not None
    quantized = sum(WIDTH * (80 if name.endswith(("_q", "_k")) else WIDTH) for name in QUANTIZED)
    # One byte less for each quantized weight; what the builder adds is small.
    assert report.gpu_memory.weights < exact - 0.3 * quantized


def test_int8_is_built_for_every_compute_capability(tmp_path: Path) -> None:
    """Also for 7.5, for which the builder adds more to weights as small as these than it saves."""
    model = layer_model(ir.DataType.FLOAT16)
    InsertQdq("int8", dict.fromkeys(QUANTIZED, 3.0))(model)
    QuantizeWeights("int8")(model)
    assert build(tmp_path, model, ("7.5",)).compute_capabilities == ("7.5",)


def test_float8_needs_compute_capability_8_9(tmp_path: Path) -> None:
    model = layer_model(ir.DataType.FLOAT16)
    QuantizeWeights("fp8")(model)
    with pytest.raises(EngineError, match="sm86"):
        build(tmp_path, model, ("8.6",))

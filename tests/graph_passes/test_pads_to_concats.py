"""Zeros after one axis are concatenated; all other pads stay."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.pads_to_concats import PadsToConcats
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import op_counts

SHAPE = (2, 3, 4, 2, 5)


def constant(name: str, values: Any, dtype: ir.DataType) -> ir.Value:
    tensor = ir.tensor(np.array(values, dtype.numpy()), name=name)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=tensor.shape)
    value.const_value = tensor
    return value


def padded(
    pads: list[int],
    axes: list[int] | None = None,
    fill: float | None = None,
    shape: tuple[int | str, ...] = SHAPE,
    mode: str = "constant",
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Model:
    """A graph that pads its input."""
    data = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(shape))
    inputs = [data, constant("pads", pads, ir.DataType.INT64), None, None]
    if fill is not None:
        inputs[2] = constant("fill", fill, dtype)
    if axes is not None:
        inputs[3] = constant("axes", axes, ir.DataType.INT64)
    node = ir.node("Pad", inputs, {"mode": mode}, name="pad")
    node.outputs[0].name, node.outputs[0].type = "y", data.type
    initializers = [value for value in inputs[1:] if value is not None]
    graph = ir.Graph(
        [data], node.outputs, nodes=[node], initializers=initializers, opset_imports={"": 23}, name="g"
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("pads", "axes", "fill"),
    [([0] * 9 + [3], None, None), ([0] * 6 + [1, 0, 0, 0], None, 0.0), ([0, 0, 0, 2], [1, -3], None)],
)
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_the_numbers_stay(
    run_onnx: RunOnnx, pads: list[int], axes: list[int] | None, fill: float | None, dtype: ir.DataType
) -> None:
    model = padded(pads, axes, fill, dtype=dtype)
    values = {"x": np.random.default_rng(0).standard_normal(SHAPE, np.float32).astype(dtype.numpy())}
    expected = run_onnx(model, values)["y"]
    assert PadsToConcats()(model).modified
    assert all(value.uses() for value in model.graph.initializers.values())
    assert op_counts(model) == {"ConstantOfShape": 1, "Concat": 1}
    np.testing.assert_array_equal(run_onnx(model, values)["y"], expected)
    assert not PadsToConcats()(model).modified


def test_the_first_axes_of_an_image() -> None:
    assert PadsToConcats()(padded([0, 1], [1], shape=(2, 3, 4, 5))).modified


@pytest.mark.parametrize(
    "model",
    [
        padded([0, 0, 0, 0, 1, 0, 0, 0, 0, 0]),  # before
        padded([0, -1], [1]),
        padded([0, 0, 1, 1], [1, 2]),
        padded([0, 1], [1], 1.0),
        padded([0, 1], [1], mode="edge"),
        padded([0, 1], [1], shape=("batch", 3, 4, 2, 5)),
        padded([0, 1], [3], shape=(2, 3, 4, 5)),  # of an image
    ],
)
def test_others_stay(model: ir.Model) -> None:
    assert not PadsToConcats()(model).modified

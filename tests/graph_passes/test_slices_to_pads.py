"""Slices of known bounds become pads with negative numbers; all others stay."""

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.slices_to_pads import SlicesToPads
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import op_counts


def sliced(
    begin: int | list[int],
    end: int | list[int],
    axis: int | list[int],
    step: int | list[int] = 1,
    shape: tuple[int | str, ...] = ("batch", 6),
) -> ir.Model:
    """A graph that takes a slice of its input, of one axis or several."""
    data = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    bounds = []
    for name, number in {"begin": begin, "end": end, "axis": axis, "step": step}.items():
        bound = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([np.size(number)]))
        bound.const_value = ir.tensor(np.atleast_1d(np.array(number, np.int64)), name=name)
        bounds.append(bound)
    node = ir.node("Slice", [data, *bounds], name="slice")
    node.outputs[0].name = "y"
    node.outputs[0].type = data.type
    graph = ir.Graph(
        [data], node.outputs, nodes=[node], initializers=bounds, opset_imports={"": 23}, name="g"
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(("begin", "end"), [(0, 2), (1, 4), (3, 2**31), (-2, 2**31), (0, -1)])
@pytest.mark.parametrize("axis", [1, -1])
def test_the_numbers_stay(run_onnx: RunOnnx, begin: int, end: int, axis: int) -> None:
    model = sliced(begin, end, axis)
    values = {"x": np.arange(12, dtype=np.float32).reshape(2, 6)}
    expected = run_onnx(model, values)["y"]
    assert SlicesToPads()(model).modified
    assert op_counts(model) == {"Pad": 1}
    assert (run_onnx(model, values)["y"] == expected).all()
    assert not SlicesToPads()(model).modified


def test_two_axes_of_which_one_is_whole(run_onnx: RunOnnx) -> None:
    model = sliced([0, 1], [5, -1], [1, 2], [1, 1], shape=(2, 5, 6))
    values = {"x": np.arange(60, dtype=np.float32).reshape(2, 5, 6)}
    expected = run_onnx(model, values)["y"]
    assert SlicesToPads()(model).modified
    assert op_counts(model) == {"Pad": 1}
    assert (run_onnx(model, values)["y"] == expected).all()


def test_a_slice_of_everything_is_removed(run_onnx: RunOnnx) -> None:
    model = sliced([0, 0], [5, 2**31], [1, 2], [1, 1], shape=(2, 5, 6))
    (y,) = model.graph.outputs
    negative = ir.node("Neg", [y], name="negative")
    negative.outputs[0].name, negative.outputs[0].type = "z", y.type
    model.graph.append(negative)
    model.graph.outputs[:] = negative.outputs
    assert SlicesToPads()(model).modified
    assert op_counts(model) == {"Neg": 1}
    values = {"x": np.arange(60, dtype=np.float32).reshape(2, 5, 6)}
    assert (run_onnx(model, values)["z"] == -values["x"]).all()
    assert not SlicesToPads()(model).modified


@pytest.mark.parametrize(
    "model",
    [sliced(0, 2, 0), sliced(0, 6, 1), sliced(0, 6, 1, 2), sliced(4, 4, 1), sliced(0, 2, 1, shape=(2, "n"))],
)
def test_other_slices_stay(model: ir.Model) -> None:
    """Of an axis of unknown size, of nothing, with a step, and a whole output of the graph."""
    assert not SlicesToPads()(model).modified

"""Reductions of many elements to few are rewritten, with the same results."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.split_reductions import SplitReductions
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import op_counts

MANY = (2, 4, 1024, 2)


def reduced(
    operator: str,
    shape: tuple[int | str, ...],
    axes: list[int],
    dtype: ir.DataType = ir.DataType.FLOAT,
    **attributes: Any,
) -> ir.Model:
    """A graph that reduces its input."""
    data = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(shape))
    inputs, initializers = [data], []
    if operator == "ArgMax":
        attributes["axis"] = axes[0]
    else:
        value = ir.Value(name="axes", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(axes)]))
        value.const_value = ir.tensor(np.array(axes, np.int64), name="axes")
        inputs, initializers = [data, value], [value]
    node = ir.node(operator, inputs, attributes, name="reduction")
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.INT64 if operator == "ArgMax" else dtype)
    graph = ir.Graph(
        [data], node.outputs, nodes=[node], initializers=initializers, opset_imports={"": 23}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def check(run_onnx: RunOnnx, model: ir.Model, values: np.ndarray, tolerance: float = 0.0) -> None:
    """The pass changes the graph and not its result, and leaves nothing to do."""
    expected = run_onnx(model, {"x": values})["y"]
    assert SplitReductions()(model).modified
    assert all(value.uses() for value in model.graph.initializers.values())
    found = run_onnx(model, {"x": values})["y"]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=0)
    assert not SplitReductions()(model).modified


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("operator", ["ReduceSum", "ReduceMean"])
@pytest.mark.parametrize("axes", [[1, 2], [-2, -3], [2], [0, 2]])
def test_a_sum_over_inner_axes(run_onnx: RunOnnx, operator: str, axes: list[int], keepdims: int) -> None:
    values = np.random.default_rng(0).uniform(0.5, 1, MANY).astype(np.float32)
    model = reduced(operator, MANY, axes, keepdims=keepdims)
    check(run_onnx, model, values, tolerance=1e-5)
    assert op_counts(model) == {"Transpose": 1, "Reshape": 2, operator: 1}


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("operator", ["ReduceMax", "ReduceMin"])
@pytest.mark.parametrize(("axes", "transposes"), [([1, 2], 1), ([1, 2, 3], 0), ([3, 2, 1], 0)])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_an_extreme(
    run_onnx: RunOnnx, operator: str, axes: list[int], transposes: int, keepdims: int, dtype: ir.DataType
) -> None:
    values = np.random.default_rng(0).standard_normal(MANY, np.float32).astype(dtype.numpy())
    model = reduced(operator, MANY, axes, dtype, keepdims=keepdims)
    check(run_onnx, model, values)
    found = op_counts(model)
    assert found.pop("Transpose", 0) == transposes
    assert found == {"Reshape": 2, operator: 2}


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axis", [2, -2])
def test_the_place_of_the_largest(run_onnx: RunOnnx, axis: int, keepdims: int) -> None:
    """Also the first of many equal ones."""
    values = np.random.default_rng(0).integers(0, 40, MANY).astype(np.float32)
    model = reduced("ArgMax", MANY, [axis], keepdims=keepdims)
    check(run_onnx, model, values)
    assert op_counts(model) == {
        "Transpose": 1,
        "Reshape": 2,
        "ReduceMax": 1,
        "ArgMax": 2,
        "GatherND": 1,
        "Mul": 1,
        "Add": 1,
    }


@pytest.mark.parametrize(
    "model",
    [
        reduced("ReduceSum", (2, 4, 1024), [1, 2]),  # contiguous
        reduced("ReduceMean", (2, 4, 1024, 1), [2]),  # contiguous, since the last axis is 1
        reduced("ReduceMax", (2, 512), [1]),  # few elements
        reduced("ReduceMax", (2048, 2048), [1]),  # many results
        reduced("ReduceMax", (2, 1031), [1]),  # a prime number of elements
        reduced("ReduceMax", ("batch", 4096), [1]),
        reduced("ArgMax", (2, 4096), [1], select_last_index=1),
        reduced("ReduceProd", (2, 4096), [1]),
        reduced("ReduceMax", (2, 4096), []),
    ],
)
def test_others_stay(model: ir.Model) -> None:
    assert not SplitReductions()(model).modified

"""Scalar constants get the rank of the other operand."""

import numpy as np
import onnx_ir as ir

from graph_passes.match_ranks import MatchRanks

FLOAT = ir.DataType.FLOAT


def value(name: str, shape: tuple[int, ...] | None, array: np.ndarray | None = None) -> ir.Value:
    made = ir.Value(name=name, type=ir.TensorType(FLOAT), shape=None if shape is None else ir.Shape(shape))
    if array is not None:
        made.const_value = ir.tensor(array, name=name)
    return made


def graph(constant: np.ndarray, shape: tuple[int, ...] | None) -> ir.Model:
    """x + c, the sum limited to [c, c]."""
    x = value("x", shape)
    c = value("c", constant.shape, constant)
    added = ir.node("Add", [x, c], name="add")
    added.outputs[0].name, added.outputs[0].type = "sum", ir.TensorType(FLOAT)
    clipped = ir.node("Clip", [added.outputs[0], c, c], name="clip")
    clipped.outputs[0].name, clipped.outputs[0].type = "y", ir.TensorType(FLOAT)
    made = ir.Graph(
        [x], clipped.outputs, nodes=[added, clipped], initializers=[c], opset_imports={"": 23}, name="g"
    )
    return ir.Model(made, ir_version=10)


def test_a_scalar_is_raised_once() -> None:
    """Clip needs the scalar, which stays."""
    model = graph(np.float32(2).reshape(()), (2, 3, 4))
    assert MatchRanks()(model).modified
    added, clipped = model.graph
    assert added.inputs[1] is not None
    assert tuple(added.inputs[1].shape or ()) == (1, 1, 1)
    assert clipped.inputs[1] is model.graph.initializers["c"]
    assert set(model.graph.initializers) == {"c", "c/rank_3"}
    assert not MatchRanks()(model).modified


def test_near_misses_are_not_changed() -> None:
    """A bias has several elements; of x the rank is not known; a constant has the rank already."""
    for constant, shape in ((np.ones(4), (2, 3, 4)), (np.ones(()), None), (np.ones((1, 1)), (2, 4))):
        assert not MatchRanks()(graph(constant.astype(np.float32), shape)).modified

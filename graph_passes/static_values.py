"""Numbers and sizes that are known without running a graph, from constants and static dimensions."""

import math

import numpy as np
import onnx_ir as ir

# Number of inputs that the value depends on; further ones are axes, shapes and the like.
_OPERANDS = {
    "Sqrt": 1,
    "Mul": 2,
    "Div": 2,
    "Cast": 1,
    "Unsqueeze": 1,
    "Squeeze": 1,
    "Identity": 1,
    "Reshape": 1,
}


def known_number(value: ir.Value | None) -> float | None:
    """The value of a constant with one element, or of arithmetic on constants and static dimensions."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is not None:
        return float(tensor.numpy().reshape(())) if tensor.size == 1 else None
    node = value.producer() if value is not None else None
    if value is None or node is None or node.domain != "":
        return None
    if node.op_type in ("Gather", "Slice"):
        read = _dimensions_read(node)
        return read[0] if len(read) == 1 else None
    numbers = []
    for operand in node.inputs[: _OPERANDS.get(node.op_type, 0)]:
        if (number := known_number(operand)) is None:
            return None
        numbers.append(number)
    return _computed(node.op_type, numbers, value.dtype) if numbers else None


def known_integers(value: ir.Value | None) -> list[int] | None:
    """The numbers of a constant, in order; None for other values."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]


def is_zero(value: ir.Value | None) -> bool:
    """Whether a value is zero for every input: a constant, or zeros of a dynamic shape times a number."""
    if value is None:
        return False
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return tensor.size <= 2**20 and not np.any(tensor.numpy())
    node = value.producer()
    if node is None:
        return False
    if node.op_type == "ConstantOfShape":
        fill = node.attributes.get("value")
        return fill is None or not np.any(fill.as_tensor().numpy())
    if node.op_type == "Mul":
        # A finite tensor times zero.
        left, right = node.inputs
        numbers = [known_number(left), known_number(right)]
        filled = any(
            x is not None and (producer := x.producer()) is not None and producer.op_type == "ConstantOfShape"
            for x in (left, right)
        )
        return is_zero(left) or is_zero(right) or (filled and 0.0 in numbers)
    return False


def reshape_sizes(reshape: ir.Node) -> list[int | None]:
    """The sizes that a Reshape gives; None for those that are not constant."""
    shape = reshape.inputs[1]
    if (constant := known_integers(shape)) is not None:
        return [*constant]
    sizes: list[int | None] = []
    for part in concatenated(shape):
        if (constant := known_integers(part)) is not None:
            sizes += constant
            continue
        node = part.producer() if part is not None else None
        if node is not None and node.op_type == "Slice":
            sizes += _dimensions_read(node)
        else:
            number = known_number(part)
            sizes.append(None if number is None else int(number))
    return sizes


def concatenated(shape: ir.Value | None) -> list[ir.Value | None]:
    """The values that a shape is concatenated from."""
    node = shape.producer() if shape is not None else None
    return list(node.inputs) if node is not None and node.op_type == "Concat" else [None]


def permutation_of(node: ir.Node) -> tuple[int, ...]:
    """The permutation of a Transpose; empty if it has none."""
    return tuple(node.attributes.get_ints("perm", ()))


def rank_of(value: ir.Value) -> int | None:
    """The number of dimensions; None if it is unknown."""
    return len(value.shape) if value.shape is not None else None


def first_input(node: ir.Node) -> ir.Value:
    """The first input, which the operator requires."""
    value = node.inputs[0]
    assert value is not None
    return value


def _computed(op_type: str, numbers: list[float], dtype: ir.DataType | None) -> float | None:
    if op_type == "Sqrt":
        return math.sqrt(numbers[0])
    if op_type == "Mul":
        return numbers[0] * numbers[1]
    if op_type == "Div":
        if not numbers[1] or dtype is None:
            return None
        quotient = numbers[0] / numbers[1]
        return float(math.floor(quotient)) if dtype.is_integer() else quotient
    return numbers[0]


def _dimensions_read(node: ir.Node) -> list[int | None]:
    """The dimensions that a Gather or Slice of a Shape reads; None for those that are not static."""
    shape = node.inputs[0].producer() if node.inputs[0] is not None else None
    rank = rank_of(first_input(shape)) if shape is not None and shape.op_type == "Shape" else None
    places = [known_number(place) for place in node.inputs[1:3]]
    if shape is None or rank is None or None in places:
        return [None]
    if shape.attributes.get_int("start", 0) or "end" in shape.attributes:
        return [None]
    bounds = [int(place) for place in places if place is not None]
    axes = range(rank)[slice(*bounds)] if node.op_type == "Slice" else [bounds[0]]
    return [known_dimension(first_input(shape), axis) for axis in axes]


def known_dimension(value: ir.Value, axis: int) -> int | None:
    """A static dimension, also behind a Transpose, Reshape or MatMul whose output has no shape."""
    if value.shape is not None and isinstance(dim := value.shape[axis], int):
        return dim
    node, rank = value.producer(), rank_of(value)
    if node is None or rank is None:
        return None
    axis %= rank
    if node.op_type == "Transpose" and (permutation := permutation_of(node)):
        return known_dimension(first_input(node), permutation[axis])
    if node.op_type == "Reshape":
        sizes = reshape_sizes(node)
        return sizes[axis] if len(sizes) == rank and (sizes[axis] or 0) > 0 else None
    if node.op_type == "MatMul" and axis == rank - 1 and node.inputs[1] is not None:
        return known_dimension(node.inputs[1], -1)
    return None

"""Recognize attention that another exporter wrote as MatMul, Softmax and MatMul."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

_SPLIT = (0, 2, 1, 3)
# How many inputs of an operator are arithmetic.
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


class RecognizeAttention(InPlacePass):
    """Replace MatMul, Softmax and MatMul between split heads by one `Attention` node.

    Recognized are the forms of diffusers' attention processors and of torch's `scaled_dot_product_attention`
    in graphs of torch's exporters: heads on an axis of their own or merged with the batch, keys transposed in
    one or two steps, the scale as factors of queries, keys or logits, a zero in place of a mask. Everything
    else, such as a mask or a softmax in another precision, is left unchanged. The heads are split and joined
    by Reshape nodes whose shapes are constants, as `find_sites` expects.

    Run it on opset 23 or later, after `FoldConstants`, which makes heads and scale known.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Replace in graph order, and remove the nodes that are unused then."""
        modified = False
        # Unused nodes would count as further consumers.
        common.RemoveUnusedNodesPass()(model)
        for node in list(model.graph):
            if node.op_type == "Softmax" and node.domain == "":
                found = _read(node)
                if found is not None:
                    _replace(model.graph, node, found)
                    modified = True
        if modified:
            common.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=modified)


@dataclasses.dataclass(frozen=True)
class _Heads:
    """The tensor [B, T, C] before its heads are split, and the heads."""

    source: ir.Value
    count: int
    size: int


@dataclasses.dataclass(frozen=True)
class _Found:
    """Queries, keys and values, the factor of the logits, and the output [B, T, C] with joined heads."""

    q: _Heads
    k: _Heads
    v: _Heads
    scale: float
    joined: ir.Value


def _read(softmax: ir.Node) -> _Found | None:
    value = softmax.inputs[0]
    axis = softmax.attributes.get_int("axis", -1)
    if value is None or not (axis == -1 or (value.shape is not None and axis == len(value.shape) - 1)):
        return None
    logits, scale = _without_scale(value)
    product = logits.producer()
    probabilities = _only_use(_after_casts(softmax.outputs[0]), "MatMul")
    if product is None or product.op_type != "MatMul" or probabilities is None:
        return None
    left, right = product.inputs
    if left is None or right is None or probabilities.inputs[0] is not _after_casts(softmax.outputs[0]):
        return None
    query, query_scale = _without_scale(left)
    key, key_scale = _without_scale(right)
    values = probabilities.inputs[1]
    q, k = _split_heads(query), _transposed_heads(key)
    v = _split_heads(values) if values is not None else None
    if q is None or k is None or v is None or {(x.count, x.size) for x in (k, v)} != {(q.count, q.size)}:
        return None
    joined = _joined(probabilities.outputs[0], q)
    return _Found(q, k, v, scale * query_scale * key_scale, joined) if joined is not None else None


def _without_scale(value: ir.Value) -> tuple[ir.Value, float]:
    """The value before constant factors, zeros that are added, and casts to its own dtype; their product."""
    scale = 1.0
    while (node := value.producer()) is not None:
        if _is_same_cast(node):
            value = _first(node)
        elif node.op_type == "Mul" and (factor := _factor(node)) is not None:
            value, number = factor
            scale *= number
        elif node.op_type == "Div" and (divisor := _number(node.inputs[1])):
            value = _first(node)
            scale /= divisor
        elif node.op_type == "Add" and _is_zero(node.inputs[1]):
            value = _first(node)
        else:
            break
    return value, scale


def _factor(node: ir.Node) -> tuple[ir.Value, float] | None:
    left, right = node.inputs
    for value, other in ((left, right), (right, left)):
        number = _number(other)
        if value is not None and number is not None:
            return value, number
    return None


def _number(value: ir.Value | None) -> float | None:
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
        if (number := _number(operand)) is None:
            return None
        numbers.append(number)
    return _computed(node.op_type, numbers, value.dtype) if numbers else None


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
    rank = _rank(_first(shape)) if shape is not None and shape.op_type == "Shape" else None
    places = [_number(place) for place in node.inputs[1:3]]
    if shape is None or rank is None or None in places:
        return [None]
    if shape.attributes.get_int("start", 0) or "end" in shape.attributes:
        return [None]
    bounds = [int(place) for place in places if place is not None]
    axes = range(rank)[slice(*bounds)] if node.op_type == "Slice" else [bounds[0]]
    return [_dimension(_first(shape), axis) for axis in axes]


def _dimension(value: ir.Value, axis: int) -> int | None:
    """A static dimension, also behind a Transpose, Reshape or MatMul whose output has no shape."""
    if value.shape is not None and isinstance(dim := value.shape[axis], int):
        return dim
    node, rank = value.producer(), _rank(value)
    if node is None or rank is None:
        return None
    axis %= rank
    if node.op_type == "Transpose" and (permutation := _permutation(node)):
        return _dimension(_first(node), permutation[axis])
    if node.op_type == "Reshape":
        sizes = _sizes(node)
        return sizes[axis] if len(sizes) == rank and (sizes[axis] or 0) > 0 else None
    if node.op_type == "MatMul" and axis == rank - 1 and node.inputs[1] is not None:
        return _dimension(node.inputs[1], -1)
    return None


def _is_zero(value: ir.Value | None) -> bool:
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
        numbers = [_number(left), _number(right)]
        filled = any(
            x is not None and (producer := x.producer()) is not None and producer.op_type == "ConstantOfShape"
            for x in (left, right)
        )
        return _is_zero(left) or _is_zero(right) or (filled and 0.0 in numbers)
    return False


def _is_same_cast(node: ir.Node) -> bool:
    if node.op_type == "Identity":
        return True
    source = node.inputs[0] if node.inputs else None
    to = node.attributes.get_int("to", None)
    return node.op_type == "Cast" and source is not None and source.dtype is not None and source.dtype == to


def _after_casts(value: ir.Value) -> ir.Value:
    """The value after casts to its own dtype."""
    while len(uses := value.consumers()) == 1 and _is_same_cast(uses[0]):
        value = uses[0].outputs[0]
    return value


def _split_heads(value: ir.Value) -> _Heads | None:
    """The heads of [B, h, T, D], or of [B h, T, D]."""
    value = _before_casts(value)
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Transpose" and _permutation(node) == _SPLIT:
        return _reshaped_heads(_first(node))
    if node.op_type == "Reshape":
        heads = _split_heads(_first(node)) if _is_split(_first(node)) else None
        return heads if heads is not None and _merges_batch(node, heads) else None
    return None


def _is_split(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "Transpose" and _permutation(node) == _SPLIT


def _transposed_heads(value: ir.Value) -> _Heads | None:
    """The heads of [B, h, D, T], or of [B h, D, T]."""
    value = _before_casts(value)
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Transpose":
        permutation = _permutation(node)
        if permutation in ((0, 1, 3, 2), (0, 2, 1)):
            return _split_heads(_first(node))
        return _reshaped_heads(_first(node)) if permutation == (0, 2, 3, 1) else None
    if node.op_type == "Reshape":
        return _transposed_in_three_steps(node)
    return None


def _transposed_in_three_steps(reshape: ir.Node) -> _Heads | None:
    """[B, h, T, D] reshaped to [B h, T, D], transposed, and reshaped to [B, h, D, T]: torch's exporter."""
    transpose = _first(reshape).producer()
    if transpose is None or transpose.op_type != "Transpose" or _permutation(transpose) != (0, 2, 1):
        return None
    merge = _first(transpose).producer()
    if merge is None or merge.op_type != "Reshape":
        return None
    heads, transposed = _split_heads(_first(merge)), reshape.outputs[0]
    if heads is None or _rank(transposed) != 4:
        return None
    sizes = (_dimension(transposed, 1), _dimension(transposed, 2))
    return heads if sizes == (heads.count, heads.size) else None


def _reshaped_heads(value: ir.Value) -> _Heads | None:
    """The heads of [B, T, h, D] = Reshape([B, T, h D])."""
    node = value.producer()
    if node is None or node.op_type != "Reshape":
        return None
    source, sizes = _first(node), _sizes(node)
    if _rank(source) != 3 or len(sizes) != 4 or sizes[2] is None or sizes[3] is None:
        return None
    width = source.shape[2] if source.shape is not None else None
    if min(sizes[2], sizes[3]) < 1 or (isinstance(width, int) and width != sizes[2] * sizes[3]):
        return None
    return _Heads(source, sizes[2], sizes[3])


def _merges_batch(reshape: ir.Node, heads: _Heads) -> bool:
    """Whether a Reshape of [B, h, T, D] gives [B h, T, D]."""
    sizes = _sizes(reshape)
    if len(sizes) != 3 or sizes[2] not in (heads.size, -1):
        return False
    batch = heads.source.shape[0] if heads.source.shape is not None else None
    if isinstance(batch, int):
        return sizes[0] == batch * heads.count
    return _is_multiple(_elements(reshape.inputs[1])[0], heads.count)


def _is_multiple(value: ir.Value | None, number: int) -> bool:
    """Whether a size is computed as a product with `number`."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Unsqueeze", "Cast", "Reshape", "Identity", "Squeeze"):
        node = _first(node).producer()
    return node is not None and node.op_type == "Mul" and number in map(_number, node.inputs)


def _joined(value: ir.Value, heads: _Heads) -> ir.Value | None:
    """[B, T, C], the heads of [B, h, T, D] or [B h, T, D] joined."""
    node = _only_use(_after_casts(value), "Transpose", "Reshape")
    if node is not None and node.op_type == "Reshape":
        if len(_sizes(node)) != 4 or _sizes(node)[1] != heads.count:
            return None
        node = _only_use(_after_casts(node.outputs[0]), "Transpose")
    if node is None or _permutation(node) != _SPLIT:
        return None
    reshape = _only_use(node.outputs[0], "Reshape")
    sizes = _sizes(reshape) if reshape is not None else []
    if reshape is None or len(sizes) != 3 or sizes[2] not in (heads.count * heads.size, -1, None):
        return None
    shape = reshape.outputs[0].shape
    known = sizes[2] is not None and sizes[2] > 0
    if not known and (shape is None or shape[-1] != heads.count * heads.size):
        return None
    return reshape.outputs[0]


def _only_use(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The only consumer besides `Shape`, if it is one of these operators."""
    users = [node for node in value.consumers() if node.op_type != "Shape"]
    if len(users) != 1 or users[0].op_type not in op_types or value.is_graph_output():
        return None
    return users[0]


def _before_casts(value: ir.Value) -> ir.Value:
    while (node := value.producer()) is not None and _is_same_cast(node):
        value = _first(node)
    return value


def _elements(shape: ir.Value | None) -> list[ir.Value | None]:
    """The values that a shape is concatenated from."""
    node = shape.producer() if shape is not None else None
    return list(node.inputs) if node is not None and node.op_type == "Concat" else [None]


def _sizes(reshape: ir.Node) -> list[int | None]:
    """The sizes that a Reshape gives; None for those that are not constant."""
    shape = reshape.inputs[1]
    tensor = ir.convenience.get_const_tensor(shape) if shape is not None else None
    if tensor is not None:
        return [int(size) for size in tensor.numpy().reshape(-1)]
    sizes: list[int | None] = []
    for part in _elements(shape):
        constant = ir.convenience.get_const_tensor(part) if part is not None else None
        if constant is not None:
            sizes += [int(size) for size in constant.numpy().reshape(-1)]
            continue
        node = part.producer() if part is not None else None
        if node is not None and node.op_type == "Slice":
            sizes += _dimensions_read(node)
        else:
            number = _number(part)
            sizes.append(None if number is None else int(number))
    return sizes


def _permutation(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints("perm", ()))


def _rank(value: ir.Value) -> int | None:
    return len(value.shape) if value.shape is not None else None


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _replace(graph: ir.Graph, softmax: ir.Node, found: _Found) -> None:
    """Insert `Attention` between split and joined heads in place of `found`."""
    path = (softmax.name or "").rpartition("/")[0]
    last = found.joined.producer()
    assert last is not None
    new = _Inserter(graph, last, path)
    q, k, v = (
        new.split(heads, letter) for heads, letter in zip((found.q, found.k, found.v), "qkv", strict=True)
    )
    shape = q.shape
    attention = new.node("Attention", [q, k, v], {"scale": found.scale}, q.dtype, shape)
    rows = new.node("Transpose", [attention], {"perm": _SPLIT}, q.dtype, None)
    shape_of = new.constant([0, 0, -1], "joined")
    joined = new.node("Reshape", [rows, shape_of], {}, q.dtype, found.q.source.shape)
    if found.joined.is_graph_output():
        joined.name, found.joined.name = found.joined.name, joined.name
    ir.convenience.replace_all_uses_with(found.joined, joined, replace_graph_outputs=True)


class _Inserter:
    """Inserts nodes before `place`, named after the module at `path`."""

    def __init__(self, graph: ir.Graph, place: ir.Node, path: str) -> None:
        self._graph = graph
        self._place = place
        self._path = path
        self._count = 0

    def node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        attributes: Mapping[str, int | float | Sequence[int]],
        dtype: ir.DataType | None,
        shape: ir.Shape | None,
    ) -> ir.Value:
        """Insert a node; returns its output."""
        self._count += 1
        name = (
            f"{self._path}/{op_type}" if op_type == "Attention" else f"{self._path}/attention_{self._count}"
        )
        node = ir.node(op_type, inputs, attributes, name=name)
        output = node.outputs[0]
        output.name = f"{self._path}/attention_{self._count}_output"
        output.type = ir.TensorType(dtype) if dtype is not None else None
        output.shape = ir.Shape(list(shape)) if shape is not None else None
        self._graph.insert_before(self._place, node)
        return output

    def constant(self, values: list[int], name: str) -> ir.Value:
        """An initializer with these integers."""
        full = f"{self._path}/attention_{name}"
        value = ir.val(full, const_value=ir.tensor(np.array(values, np.int64), name=full))
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(values)])
        self._graph.register_initializer(value)
        return value

    def split(self, heads: _Heads, letter: str) -> ir.Value:
        """[B, h, T, D] of the tensor before its heads are split."""
        source = heads.source
        assert source.shape is not None
        batch, tokens, _ = source.shape
        sizes = self.constant([0, 0, heads.count, heads.size], f"{letter}_heads")
        split = ir.Shape([batch, tokens, heads.count, heads.size])
        rows = self.node("Reshape", [source, sizes], {}, source.dtype, split)
        shape = ir.Shape([batch, heads.count, tokens, heads.size])
        return self.node("Transpose", [rows], {"perm": _SPLIT}, source.dtype, shape)

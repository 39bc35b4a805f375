"""Recognize attention that another exporter wrote as MatMul, Softmax and MatMul."""

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from graph_passes.conditions import require_attention_opset
from graph_passes.find_sites import HEAD_SPLIT
from graph_passes.functions.building import add_integers
from graph_passes.static_values import (
    concatenated,
    first_input,
    is_zero,
    known_dimension,
    known_number,
    permutation_of,
    rank_of,
    reshape_sizes,
)


class RecognizeAttention(InPlacePass):
    """Replace MatMul, Softmax and MatMul between split heads by one `Attention` node.

    Recognized are the forms of diffusers' attention processors and of torch's `scaled_dot_product_attention`
    in graphs of torch's exporters: heads on an axis of their own or merged with the batch, keys transposed in
    one or two steps, the scale as factors of queries, keys or logits, a zero in place of a mask. Everything
    else, such as a mask or a softmax in another precision, is left unchanged. The heads are split and joined
    by Reshape nodes whose shapes are constants, as `find_sites` expects.

    Run it after `FoldConstants`, which makes heads and scale known.
    """

    def requires(self, model: ir.Model) -> None:
        """The opset has `Attention` (`require_attention_opset`)."""
        require_attention_opset(model)

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
            value = first_input(node)
        elif node.op_type == "Mul" and (factor := _factor(node)) is not None:
            value, number = factor
            scale *= number
        elif node.op_type == "Div" and (divisor := known_number(node.inputs[1])):
            value = first_input(node)
            scale /= divisor
        elif node.op_type == "Add" and is_zero(node.inputs[1]):
            value = first_input(node)
        else:
            break
    return value, scale


def _factor(node: ir.Node) -> tuple[ir.Value, float] | None:
    left, right = node.inputs
    for value, other in ((left, right), (right, left)):
        number = known_number(other)
        if value is not None and number is not None:
            return value, number
    return None


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
    if node.op_type == "Transpose" and permutation_of(node) == HEAD_SPLIT:
        return _reshaped_heads(first_input(node))
    if node.op_type == "Reshape":
        heads = _split_heads(first_input(node)) if _is_split(first_input(node)) else None
        return heads if heads is not None and _merges_batch(node, heads) else None
    return None


def _is_split(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "Transpose" and permutation_of(node) == HEAD_SPLIT


def _transposed_heads(value: ir.Value) -> _Heads | None:
    """The heads of [B, h, D, T], or of [B h, D, T]."""
    value = _before_casts(value)
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Transpose":
        permutation = permutation_of(node)
        if permutation in ((0, 1, 3, 2), (0, 2, 1)):
            return _split_heads(first_input(node))
        return _reshaped_heads(first_input(node)) if permutation == (0, 2, 3, 1) else None
    if node.op_type == "Reshape":
        return _transposed_in_three_steps(node)
    return None


def _transposed_in_three_steps(reshape: ir.Node) -> _Heads | None:
    """[B, h, T, D] reshaped to [B h, T, D], transposed, and reshaped to [B, h, D, T]: torch's exporter."""
    transpose = first_input(reshape).producer()
    if transpose is None or transpose.op_type != "Transpose" or permutation_of(transpose) != (0, 2, 1):
        return None
    merge = first_input(transpose).producer()
    if merge is None or merge.op_type != "Reshape":
        return None
    heads, transposed = _split_heads(first_input(merge)), reshape.outputs[0]
    if heads is None or rank_of(transposed) != 4:
        return None
    sizes = (known_dimension(transposed, 1), known_dimension(transposed, 2))
    return heads if sizes == (heads.count, heads.size) else None


def _reshaped_heads(value: ir.Value) -> _Heads | None:
    """The heads of [B, T, h, D] = Reshape([B, T, h D])."""
    node = value.producer()
    if node is None or node.op_type != "Reshape":
        return None
    source, sizes = first_input(node), reshape_sizes(node)
    if rank_of(source) != 3 or len(sizes) != 4 or sizes[2] is None or sizes[3] is None:
        return None
    width = source.shape[2] if source.shape is not None else None
    if min(sizes[2], sizes[3]) < 1 or (isinstance(width, int) and width != sizes[2] * sizes[3]):
        return None
    return _Heads(source, sizes[2], sizes[3])


def _merges_batch(reshape: ir.Node, heads: _Heads) -> bool:
    """Whether a Reshape of [B, h, T, D] gives [B h, T, D]."""
    sizes = reshape_sizes(reshape)
    if len(sizes) != 3 or sizes[2] not in (heads.size, -1):
        return False
    batch = heads.source.shape[0] if heads.source.shape is not None else None
    if isinstance(batch, int):
        return sizes[0] == batch * heads.count
    return _is_multiple(concatenated(reshape.inputs[1])[0], heads.count)


def _is_multiple(value: ir.Value | None, number: int) -> bool:
    """Whether a size is computed as a product with `number`."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Unsqueeze", "Cast", "Reshape", "Identity", "Squeeze"):
        node = first_input(node).producer()
    return node is not None and node.op_type == "Mul" and number in map(known_number, node.inputs)


def _joined(value: ir.Value, heads: _Heads) -> ir.Value | None:
    """[B, T, C], the heads of [B, h, T, D] or [B h, T, D] joined."""
    node = _only_use(_after_casts(value), "Transpose", "Reshape")
    if node is not None and node.op_type == "Reshape":
        if len(reshape_sizes(node)) != 4 or reshape_sizes(node)[1] != heads.count:
            return None
        node = _only_use(_after_casts(node.outputs[0]), "Transpose")
    if node is None or permutation_of(node) != HEAD_SPLIT:
        return None
    reshape = _only_use(node.outputs[0], "Reshape")
    sizes = reshape_sizes(reshape) if reshape is not None else []
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
        value = first_input(node)
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
    rows = new.node("Transpose", [attention], {"perm": HEAD_SPLIT}, q.dtype, None)
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
        return add_integers(self._graph, f"{self._path}/attention_{name}", values)

    def split(self, heads: _Heads, letter: str) -> ir.Value:
        """[B, h, T, D] of the tensor before its heads are split."""
        source = heads.source
        assert source.shape is not None
        batch, tokens, _ = source.shape
        sizes = self.constant([0, 0, heads.count, heads.size], f"{letter}_heads")
        split = ir.Shape([batch, tokens, heads.count, heads.size])
        rows = self.node("Reshape", [source, sizes], {}, source.dtype, split)
        shape = ir.Shape([batch, heads.count, tokens, heads.size])
        return self.node("Transpose", [rows], {"perm": HEAD_SPLIT}, source.dtype, shape)

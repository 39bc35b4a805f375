"""Rewrite reductions of many elements to few, for a runtime with few threads for each result."""

import dataclasses
import math
from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from graph_passes.conditions import require_attention_opset, require_initializers
from graph_passes.functions.building import add_integers
from graph_passes.static_values import first_input, known_integers

MIN_ELEMENTS = 1024
"""Reductions of fewer elements to each result stay: an ArgMax of 1,024 took 71 µs on an H200."""
MAX_RESULTS = 1024
"""Reductions to more results stay: 4,096 maxima of 256 elements each took 19 µs there."""
_SUMS = ("ReduceSum", "ReduceMean")


class SplitReductions(InPlacePass):
    """Rewrite reductions of static shapes where each of a few results is that of many elements.

    ONNX Runtime's CUDA provider leaves reductions to cuDNN: the largest of 32,768 numbers took 240 µs on an
    H200. It has a kernel of its own for sums and means over the last axes.

    * A sum or mean over other axes: a Transpose makes them the last ones.
    * A largest or smallest element: first of each group of elements, then of the results of the groups.
    * An ArgMax: first the group, then the place in it. The first of equal elements is the first one in the
      first group that has one.

    Run it after `CleanGraph`, which makes axes initializers.
    """

    def requires(self, model: ir.Model) -> None:
        """All constants are initializers, and axes are inputs of reductions (`require_attention_opset`)."""
        require_initializers(model)
        require_attention_opset(model)

    def call(self, model: ir.Model) -> PassResult:
        """Replace the nodes of the main graph."""
        modified = False
        for node in list(model.graph):
            reduction = _reduction(node)
            if reduction is not None and reduction.is_slow():
                _replace(model.graph, node, reduction)
                modified = True
        if modified:
            # The axes of the replaced nodes may have no other consumer.
            common.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=modified)


@dataclasses.dataclass(frozen=True)
class _Reduction:
    """A reduction of a tensor with static shape over `axes`, in order and not negative."""

    operator: str
    shape: Sequence[int]
    axes: Sequence[int]

    @property
    def kept(self) -> list[int]:
        """The axes of the results."""
        return [axis for axis in range(len(self.shape)) if axis not in self.axes]

    @property
    def results(self) -> int:
        """Number of results."""
        return math.prod(self.shape[axis] for axis in self.kept)

    @property
    def elements(self) -> int:
        """Of each result."""
        return math.prod(self.shape[axis] for axis in self.axes)

    @property
    def groups(self) -> int:
        """The divisor of the number of elements that is nearest to its root, from below."""
        return next(n for n in range(math.isqrt(self.elements), 0, -1) if self.elements % n == 0)

    @property
    def trailing(self) -> bool:
        """The elements of each result are contiguous."""
        wide = [axis for axis, size in enumerate(self.shape) if size > 1]
        return [axis for axis in (*self.kept, *self.axes) if axis in wide] == wide

    def is_slow(self) -> bool:
        """Whether the nodes that replace it are faster."""
        if self.results > MAX_RESULTS or self.elements < MIN_ELEMENTS:
            return False
        return not self.trailing if self.operator in _SUMS else self.groups > 1


def _reduction(node: ir.Node) -> _Reduction | None:
    """The reduction that a node is; None for other nodes, dynamic shapes and axes that are not constant."""
    if node.domain != "" or node.op_type not in (*_SUMS, "ReduceMax", "ReduceMin", "ArgMax"):
        return None
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if node.op_type == "ArgMax" and node.attributes.get_int("select_last_index", 0) == 0:
        axes: list[int] | None = [node.attributes.get_int("axis", 0)]
    else:
        axes = known_integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if shape is None or not shape.is_static() or axes is None:
        return None
    sizes = [int(size) for size in shape.numpy()]
    return _Reduction(node.op_type, sizes, sorted(axis % len(sizes) for axis in axes))


class _Nodes:
    """Nodes that replace a reduction; their constants are added to its graph."""

    def __init__(self, graph: ir.Graph, name: str) -> None:
        self.tape = ir.tape.Tape()
        self._graph = graph
        self._name = name

    def add(self, operator: str, *inputs: ir.Value, **attributes: int | Sequence[int]) -> ir.Value:
        """Append a node."""
        output = self.tape.op(operator, inputs, attributes)
        output.name = f"{self._name}/reduction_{len(self.tape.nodes)}"
        return output

    def constant(self, numbers: Sequence[int]) -> ir.Value:
        """An initializer for the next node: [N] int64."""
        return add_integers(self._graph, f"{self._name}/constant_{len(self.tape.nodes)}", numbers)

    def reshape(self, x: ir.Value, *sizes: int) -> ir.Value:
        """`x` in another shape."""
        return self.add("Reshape", x, self.constant(sizes))

    def reduce(self, operator: str, x: ir.Value, axis: int) -> ir.Value:
        """`x` without `axis`."""
        return self.add(operator, x, self.constant([axis]), keepdims=0)

    def argmax(self, x: ir.Value, size: int) -> ir.Value:
        """The index [N, 1] of the largest of `x` [N, groups, size], counted through all groups."""
        group = self.add("ArgMax", self.reduce("ReduceMax", x, 2), axis=1)
        place = self.add("ArgMax", self.add("GatherND", x, group, batch_dims=1), axis=1)
        return self.add("Add", self.add("Mul", group, self.constant([size])), place)


def _replace(graph: ir.Graph, node: ir.Node, reduction: _Reduction) -> None:
    """Replace a reduction by faster nodes; see `SplitReductions`."""
    (taken,) = node.outputs
    nodes = _Nodes(graph, str(taken.name))
    x = first_input(node)
    if not reduction.trailing:
        x = nodes.add("Transpose", x, perm=[*reduction.kept, *reduction.axes])
    if reduction.operator in _SUMS:
        x = nodes.reshape(x, reduction.results, reduction.elements)
        x = nodes.reduce(reduction.operator, x, 1)
    else:
        size = reduction.elements // reduction.groups
        x = nodes.reshape(x, reduction.results, reduction.groups, size)
        if reduction.operator == "ArgMax":
            x = nodes.argmax(x, size)
        else:
            x = nodes.reduce(reduction.operator, nodes.reduce(reduction.operator, x, 2), 1)
    keeps = node.attributes.get_int("keepdims", 1)
    sizes = [1 if axis in reduction.axes else size for axis, size in enumerate(reduction.shape)]
    output = nodes.reshape(x, *(size for axis, size in enumerate(sizes) if keeps or axis in reduction.kept))
    output.name, output.type, output.shape = taken.name, taken.type, taken.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes.tape.nodes, [taken], [output])

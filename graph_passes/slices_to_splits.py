"""Replace Slice by Split, for a runtime whose parser makes many layers of a Slice."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from graph_passes.conditions import require_initializers


class SlicesToSplits(InPlacePass):
    """Replace a Slice of one axis of known size, with constant bounds and a step of 1, by a Split.

    TensorRT's parser computes the bounds of a Slice with about 25 layers, even if all shapes are static; each
    output of a Split is one layer. Run it after `CleanGraph`, which makes the bounds initializers.
    """

    def requires(self, model: ir.Model) -> None:
        """All constants are initializers (`require_initializers`)."""
        require_initializers(model)

    def call(self, model: ir.Model) -> PassResult:
        """Replace the nodes of the main graph."""
        modified = False
        for node in list(model.graph):
            sizes = _parts(node)
            if sizes is not None:
                _replace(model.graph, node, *sizes)
                modified = True
        if modified:
            # Bounds that no other Slice has are left.
            common.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=modified)


def _parts(node: ir.Node) -> tuple[int, list[int], int] | None:
    """Axis, sizes of the parts and index of the part that a Slice takes; None if it is of another kind."""
    data = node.inputs[0] if node.op_type == "Slice" and len(node.inputs) > 3 else None
    if data is None or data.shape is None:
        return None
    bounds = [_constant(value) for value in node.inputs[1:]]
    if any(bound is None or len(bound) != 1 for bound in bounds):
        return None
    begin, end, axis, *step = (bound[0] for bound in bounds if bound is not None)
    axis %= len(data.shape)
    size = data.shape[axis]
    if step not in ([], [1]) or not isinstance(size, int):
        return None
    first, last, _ = slice(begin, end).indices(size)
    parts = [first, last - first, size - last]
    if parts[1] < 1 or parts[1] == size:
        return None
    return axis, [part for part in parts if part], int(first > 0)


def _constant(value: ir.Value | None) -> Sequence[int] | None:
    if value is None or value.const_value is None:
        return None
    return [int(number) for number in np.ravel(value.const_value.numpy())]


def _replace(graph: ir.Graph, node: ir.Node, axis: int, sizes: list[int], index: int) -> None:
    (taken,) = node.outputs
    name = f"{taken.name}/sizes"
    tensor = ir.tensor(np.array(sizes, np.int64), name=name)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(sizes)]))
    value.const_value = tensor
    graph.register_initializer(value)
    split = ir.node("Split", [node.inputs[0], value], {"axis": axis}, name=node.name, num_outputs=len(sizes))
    for number, output in enumerate(split.outputs):
        output.name = taken.name if number == index else f"{taken.name}/rest_{number}"
        output.type = taken.type
    split.outputs[index].shape = taken.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], [split], [taken], [split.outputs[index]])

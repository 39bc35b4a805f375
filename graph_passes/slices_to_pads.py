"""Replace Slice by Pad, for a runtime whose parser makes many layers of a Slice."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from graph_passes.conditions import require_initializers
from graph_passes.functions.building import add_integers
from graph_passes.static_values import known_integers


class SlicesToPads(InPlacePass):
    """Replace a Slice of axes of known size, with constant bounds and steps of 1, by a Pad.

    The numbers of elements to add are negative: those that the Slice leaves out. TensorRT's parser computes
    the bounds of a Slice with about 25 layers, even if all shapes are static, and makes one layer of a Pad.
    A Slice that leaves out nothing is removed. Run it after `CleanGraph`, which makes the bounds
    initializers.
    """

    def requires(self, model: ir.Model) -> None:
        """All constants are initializers (`require_initializers`)."""
        require_initializers(model)

    def call(self, model: ir.Model) -> PassResult:
        """Replace the nodes of the main graph."""
        modified = False
        for node in list(model.graph):
            pads = _pads(node)
            if pads is None:
                continue
            if any(pads):
                _replace(model.graph, node, pads)
            elif not _remove(model.graph, node):
                continue
            modified = True
        if modified:
            # The bounds of the removed Slice nodes may have no other consumer.
            common.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=modified)


def _pads(node: ir.Node) -> list[int] | None:
    """The pads [2 * rank] of the Pad that replaces a Slice, all <= 0; None for any other node."""
    data = node.inputs[0] if node.op_type == "Slice" and len(node.inputs) > 3 else None
    if data is None or data.shape is None:
        return None
    bounds = [known_integers(value) for value in node.inputs[1:]]
    if any(bound is None for bound in bounds):
        return None
    rank = len(data.shape)
    # For all axes: see the note on Pad in functions/transport.py.
    pads = [0] * (2 * rank)
    for begin, end, axis, *step in zip(*(bound for bound in bounds if bound is not None), strict=True):
        size = data.shape[axis]
        if step not in ([], [1]) or not isinstance(size, int):
            return None
        first, last, _ = slice(begin, end).indices(size)
        if last <= first:
            return None
        pads[axis % rank], pads[rank + axis % rank] = -first, last - size
    return pads


def _remove(graph: ir.Graph, node: ir.Node) -> bool:
    """Remove a node whose output is its first input; False if the output is one of the graph."""
    (taken,), data = node.outputs, node.inputs[0]
    if data is None or taken.is_graph_output():
        return False
    ir.convenience.replace_all_uses_with(taken, data)
    graph.remove(node, safe=True)
    return True


def _replace(graph: ir.Graph, node: ir.Node, pads: list[int]) -> None:
    (taken,) = node.outputs
    numbers = add_integers(graph, f"{taken.name}/pads", pads)
    pad = ir.node("Pad", [node.inputs[0], numbers], name=node.name)
    output = pad.outputs[0]
    output.name, output.type, output.shape = taken.name, taken.type, taken.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], [pad], [taken], [output])

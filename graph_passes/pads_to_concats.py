"""Replace Pad by Concat, for a runtime whose kernel for Pad is slow."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from graph_passes.conditions import require_attention_opset, require_initializers
from graph_passes.functions.building import add_integers
from graph_passes.static_values import is_zero, known_integers


class PadsToConcats(InPlacePass):
    """Replace a Pad that adds zeros after one axis of a static shape by a Concat with zeros.

    ONNX Runtime's CUDA provider divides for each axis of each element that a Pad writes: 12 MB took 305 µs on
    an H200. It has another kernel for the last two axes of a tensor of rank 4, whose Pad stays. Run it after
    `CleanGraph`, which makes the numbers of zeros initializers.
    """

    def requires(self, model: ir.Model) -> None:
        """All constants are initializers, and pads are inputs (`require_attention_opset`)."""
        require_initializers(model)
        require_attention_opset(model)

    def call(self, model: ir.Model) -> PassResult:
        """Replace the nodes of the main graph."""
        modified = False
        for node in list(model.graph):
            if (added := _added(node)) is not None:
                _replace(model.graph, node, *added)
                modified = True
        if modified:
            # The numbers of zeros may have no other consumer.
            common.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=modified)


def _added(node: ir.Node) -> tuple[int, int] | None:
    """The axis after which a Pad adds zeros, and how many; None for any other node."""
    if (node.domain, node.op_type) != ("", "Pad") or node.attributes.get_string(
        "mode", "constant"
    ) != "constant":
        return None
    data, pads, fill, axes = (*node.inputs, None, None)[:4]
    shape = data.shape if data is not None else None
    numbers = known_integers(pads)
    if shape is None or not shape.is_static() or numbers is None or not (fill is None or is_zero(fill)):
        return None
    rank = len(shape)
    given = list(range(rank)) if axes is None else known_integers(axes)
    if given is None:
        return None
    before, after = numbers[: len(given)], numbers[len(given) :]
    padded = [(axis % rank, number) for axis, number in zip(given, after, strict=True) if number]
    if any(before) or len(padded) != 1 or padded[0][1] < 0 or (rank == 4 and padded[0][0] >= 2):
        return None
    return padded[0]


def _replace(graph: ir.Graph, node: ir.Node, axis: int, number: int) -> None:
    """Replace a Pad by a Concat with `number` zeros along `axis`."""
    data, (taken,) = node.inputs[0], node.outputs
    assert data is not None
    assert data.shape is not None
    assert data.dtype is not None
    sizes = [int(size) for size in data.shape.numpy()]
    sizes[axis] = number
    shape = add_integers(graph, f"{taken.name}/zeros_shape", sizes)
    # Not an initializer, which would be stored.
    zero = ir.tensor(np.zeros(1, data.dtype.numpy()))
    zeros = ir.node("ConstantOfShape", [shape], {"value": zero}, name=f"{node.name}/zeros")
    zeros.outputs[0].name, zeros.outputs[0].type = f"{taken.name}/zeros", data.type
    concat = ir.node("Concat", [data, zeros.outputs[0]], {"axis": axis}, name=node.name)
    output = concat.outputs[0]
    output.name, output.type, output.shape = taken.name, taken.type, taken.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], [zeros, concat], [taken], [output])

"""Remove `Mul` nodes that only order others, for a runtime that does not compute nodes early."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from graph_passes.conditions import require_initializers
from graph_passes.static_values import first_input, known_number


class RemoveOrdering(InPlacePass):
    """Replace `x * Clip(earlier, 1, 1)` by `x`: see `after` in functions/building.py.

    Such a `Mul` reads all of `x`, and the reduction that `earlier` comes from can read a large tensor. One
    between two Casts, which round `x`, is removed too: ONNX Runtime keeps a Cast to a type of less precision
    and the one back. One with an unknown shape stays, since `x` may be broadcast. Run it after `CleanGraph`,
    which makes the bounds initializers.
    """

    def requires(self, model: ir.Model) -> None:
        """All constants are initializers (`require_initializers`)."""
        require_initializers(model)

    def call(self, model: ir.Model) -> PassResult:
        """Remove the nodes of the main graph."""
        modified = False
        for node in list(model.graph):
            if _only_orders(node):
                ir.convenience.replace_all_uses_with(node.outputs[0], first_input(node))
                model.graph.remove(node, safe=True)
                modified = True
        if modified:
            common.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=modified)


def _only_orders(node: ir.Node) -> bool:
    """Whether a node is a `Mul` by a number that is always 1, and has the shape of its first factor."""
    if (node.domain, node.op_type) != ("", "Mul") or node.outputs[0].is_graph_output():
        return False
    value, one = node.inputs
    clip = one.producer() if one is not None else None
    if value is None or clip is None or (clip.domain, clip.op_type, len(clip.inputs)) != ("", "Clip", 3):
        return False
    bounds = [known_number(bound) for bound in clip.inputs[1:]]
    return bounds == [1.0, 1.0] and _is_known(value.shape) and value.shape == node.outputs[0].shape


def _is_known(shape: ir.Shape | None) -> bool:
    """Whether each dimension has a number or a name: two that have neither can differ."""
    return shape is not None and not any(shape.is_unknown_dim(axis) for axis in range(len(shape)))

"""Remove products that only delay a node, for a runtime that runs nodes in the order of the graph."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from graph_passes.conditions import require_initializers
from graph_passes.static_values import first_input, known_number


class RemoveWaits(InPlacePass):
    """Replace `x * Clip(earlier, 1, 1)` by `x`: see `after` in functions/building.py.

    What `earlier` is reduced from can be large. Run it after `CleanGraph`, which makes the bounds
    initializers.
    """

    def requires(self, model: ir.Model) -> None:
        """All constants are initializers (`require_initializers`)."""
        require_initializers(model)

    def call(self, model: ir.Model) -> PassResult:
        """Remove the nodes of the main graph."""
        modified = False
        for node in list(model.graph):
            if _is_wait(node):
                ir.convenience.replace_all_uses_with(node.outputs[0], first_input(node))
                model.graph.remove(node, safe=True)
                modified = True
        if modified:
            common.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=modified)


def _is_wait(node: ir.Node) -> bool:
    """A product of the shape of its first factor, whose second is 1 in any case."""
    if (node.domain, node.op_type) != ("", "Mul") or node.outputs[0].is_graph_output():
        return False
    value, one = node.inputs
    clip = one.producer() if one is not None else None
    if value is None or clip is None or (clip.domain, clip.op_type, len(clip.inputs)) != ("", "Clip", 3):
        return False
    bounds = [known_number(bound) for bound in clip.inputs[1:]]
    return bounds == [1.0, 1.0] and value.shape is not None and value.shape == node.outputs[0].shape

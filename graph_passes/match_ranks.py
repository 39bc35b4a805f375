"""Give scalar constants the rank of the tensor that they are combined with."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from graph_passes.conditions import require_initializers
from graph_passes.functions.building import add_initializer

_BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div", "Max", "Min", "Greater", "Less", "Where"})


class MatchRanks(InPlacePass):
    """Replace initializers of one element by ones with as many dimensions as the other operands.

    TensorRT's parser adds a layer for each operand whose rank it has to raise. Run it after `CleanGraph`,
    which makes constants initializers. Other initializers, such as biases, are not changed.
    """

    def requires(self, model: ir.Model) -> None:
        """All constants are initializers (`require_initializers`)."""
        require_initializers(model)

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the operands of the nodes of the main graph."""
        modified = False
        for node in model.graph:
            if node.op_type not in _BROADCASTING or node.domain != "":
                continue
            shapes = [value.shape for value in node.inputs if value is not None]
            if None in shapes:
                continue
            rank = max(len(shape) for shape in shapes if shape is not None)
            for index, value in enumerate(node.inputs):
                raised = _raised(model.graph, value, rank)
                if value is None or raised is None:
                    continue
                node.replace_input_with(index, raised)
                if not value.uses() and not value.is_graph_output():
                    del model.graph.initializers[value.name or ""]
                modified = True
        return PassResult(model, modified=modified)


def _raised(graph: ir.Graph, value: ir.Value | None, rank: int) -> ir.Value | None:
    """The initializer with the element of `value` and `rank` dimensions; None if there is nothing to do."""
    tensor = value.const_value if value is not None else None
    if value is None or tensor is None or tensor.size != 1 or len(tensor.shape) >= rank:
        return None
    name = f"{value.name}/rank_{rank}"
    if name not in graph.initializers:
        add_initializer(graph, ir.tensor(tensor.numpy().reshape([1] * rank), name=name))
    return graph.initializers[name]

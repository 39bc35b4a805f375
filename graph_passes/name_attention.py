"""Give attention without a scale the name of TensorRT's own operator for it."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from graph_passes.functions import DOMAIN
from graph_passes.functions.building import OPSET

OPERATOR = "TRT_Attention"


class NameAttention(InPlacePass):
    """Replace `Attention` of 4-D tensors with a scale of 1 by calls of the function `sws.TRT_Attention`.

    TensorRT's parser makes eight layers of an `Attention`, six of which multiply queries and keys by the
    square root of the scale. It has an operator `TRT_Attention` without a scale, of two layers, and takes an
    operator of its own before a function of the model, whatever the domain. All other runtimes, and parsers
    without the operator, use the function, which is that same `Attention`.

    Run it at the end. Attentions with other inputs, attributes or ranks are not changed.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Replace the nodes of the main graph, and add the function."""
        found = [node for node in model.graph if _is_unscaled(node)]
        for node in found:
            call = ir.node(OPERATOR, node.inputs, domain=DOMAIN, name=node.name)
            (y,), (replaced,) = call.outputs, node.outputs
            y.name, y.type, y.shape = replaced.name, replaced.type, replaced.shape
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], [call], [replaced], [y])
        if found:
            function = _attention()
            model.functions[function.identifier()] = function
            model.graph.opset_imports[DOMAIN] = 1
        return PassResult(model, modified=bool(found))


def _is_unscaled(node: ir.Node) -> bool:
    if node.op_identifier() != ("", "Attention", "") or len(node.inputs) != 3:
        return False
    scale = node.attributes.get("scale")
    return node.attributes.keys() == {"scale"} and scale is not None and scale.as_float() == 1.0


def _attention() -> ir.Function:
    """The function; its values have no types, since it is called with several."""
    inputs = [ir.Value(name=name) for name in ("q", "k", "v")]
    node = ir.node("Attention", inputs, {"scale": 1.0}, name="attention")
    node.outputs[0].name = "y"
    opset_imports = {"": OPSET}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports=opset_imports, name=OPERATOR)
    return ir.Function(DOMAIN, OPERATOR, "", graph=graph, attributes=[])

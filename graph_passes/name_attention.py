"""Give attention the name of TensorRT's own operator for it, which has no scale."""

import math

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from graph_passes.conditions import require_lowered
from graph_passes.functions import DOMAIN
from graph_passes.functions.building import OPSET, add_initializer

OPERATOR = "TRT_Attention"


class NameAttention(InPlacePass):
    """Replace `Attention` of 4-D tensors by calls of the function `sws.TRT_Attention`, whose scale is 1.

    TensorRT's parser converts an `Attention` to up to eighteen layers, most of which multiply queries and
    keys by the square root of the scale, in their own dtype. Its own operator `TRT_Attention` has no scale
    and becomes two layers. The parser prefers its own operators to functions of the model that have the same
    name, whatever their domain. All other runtimes, and parsers without the operator, use the function, which
    is an `Attention`. The pass multiplies queries by the scale, unless it is 1.

    Run it at the end. Attentions with other inputs, attributes or ranks are not changed.
    """

    def requires(self, model: ir.Model) -> None:
        """All other functions of domain `sws` are lowered (`require_lowered`): they may hold attention."""
        require_lowered(model, {OPERATOR})

    def call(self, model: ir.Model) -> PassResult:
        """Replace the nodes of the main graph, and add the function."""
        modified = False
        for node in list(model.graph):
            scale = _scale(node)
            if scale is None:
                continue
            _replace(model.graph, node, scale)
            modified = True
        if modified:
            function = _attention()
            model.functions[function.identifier()] = function
            model.graph.opset_imports[DOMAIN] = 1
        return PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        """No `Attention` of 4-D tensors with three inputs and no attribute but a scale is left.

        Raises:
            PostconditionError: Names the first such node.
        """
        for node in model.graph:
            if _scale(node) is not None:
                raise PostconditionError(
                    f"node {node.name}: an Attention is not called as {DOMAIN}.{OPERATOR}"
                )


def _scale(node: ir.Node) -> float | None:
    """The scale of the logits; None for a node that is not replaced."""
    if node.op_identifier() != ("", "Attention", "") or len(node.inputs) != 3:
        return None
    if node.attributes.keys() - {"scale"}:
        return None
    scale = node.attributes.get("scale")
    if scale is not None and scale.as_float() == 1.0:
        return 1.0
    query = node.inputs[0]
    if query is None or query.shape is None or query.dtype is None or len(query.shape) != 4:
        return None
    if scale is not None:
        return scale.as_float()
    size = query.shape[3]
    return 1 / math.sqrt(size) if isinstance(size, int) else None


def _replace(graph: ir.Graph, node: ir.Node, scale: float) -> None:
    new, query = [], node.inputs[0]
    if scale != 1:
        assert query is not None
        assert query.dtype is not None
        name = f"{node.outputs[0].name}/scale"
        factor = add_initializer(
            graph, ir.tensor(np.full((1, 1, 1, 1), scale, query.dtype.numpy()), name=name)
        )
        new.append(ir.node("Mul", [query, factor], name=f"{node.name}/scaled_query"))
        (scaled,) = new[0].outputs
        scaled.name, scaled.type, scaled.shape = (
            f"{node.outputs[0].name}/scaled_query",
            query.type,
            query.shape,
        )
        query = scaled
    call = ir.node(OPERATOR, [query, *node.inputs[1:]], domain=DOMAIN, name=node.name)
    (y,), (replaced,) = call.outputs, node.outputs
    y.name, y.type, y.shape = replaced.name, replaced.type, replaced.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], [*new, call], [replaced], [y])


def _attention() -> ir.Function:
    """The function; its values have no types, since it is called with several."""
    inputs = [ir.Value(name=name) for name in ("q", "k", "v")]
    node = ir.node("Attention", inputs, {"scale": 1.0}, name="attention")
    node.outputs[0].name = "y"
    opset_imports = {"": OPSET}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports=opset_imports, name=OPERATOR)
    return ir.Function(DOMAIN, OPERATOR, "", graph=graph, attributes=[])

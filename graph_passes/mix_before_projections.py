"""Transport and mix the input of the projections to keys and values instead of both outputs."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from graph_passes.choose_transport import DENSE_TOKENS
from graph_passes.conditions import ensure_defined
from graph_passes.functions import DOMAIN
from graph_passes.grids import static_tokens


class MixBeforeProjections(InPlacePass):
    """Replace `sws.Attention` by `sws.ProjectedAttention` at sites with many tokens.

    At a site of up to `DENSE_TOKENS` tokens, a transport costs about as much as the further projection.
    Keys and values must be products of one tensor with matrices: a site whose projections have a bias, or
    that adds a LoRA to them, is not changed, and neither is one whose guard materializes its logits. A grid
    with dynamic shapes has many tokens.

    Run it after `ChooseGuard` and before functions are lowered, on a model that has `sws.ProjectedAttention`;
    others are not changed.
    """

    def ensures(self, model: ir.Model) -> None:
        """The model has the functions that sites call now."""
        ensure_defined(model)

    def call(self, model: ir.Model) -> PassResult:
        """Replace the calls."""
        if (DOMAIN, "ProjectedAttention", "") not in model.functions:
            return PassResult(model, modified=False)
        modified = False
        for node in list(model.graph):
            if node.op_identifier() != (DOMAIN, "Attention", ""):
                continue
            projections = _projections(node)
            if projections is None or 0 < static_tokens(node.inputs[3]) <= DENSE_TOKENS:
                continue
            _replace(model.graph, node, projections)
            modified = True
        return PassResult(model, modified=modified)


def _projections(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x and the weights of keys x Wk and values x Wv."""
    x, weights = None, []
    for value in node.inputs[1:3]:
        product = value.producer() if value is not None else None
        if product is None or product.op_type != "MatMul" or product.domain != "":
            return None
        source, weight = product.inputs
        if source is None or weight is None or x not in (None, source):
            return None
        if weight.shape is None or len(weight.shape) != 2:
            return None
        x = source
        weights.append(weight)
    assert x is not None
    return x, weights[0], weights[1]


def _replace(graph: ir.Graph, node: ir.Node, projections: tuple[ir.Value, ir.Value, ir.Value]) -> None:
    projected = ir.node(
        "ProjectedAttention",
        [node.inputs[0], *projections, *node.inputs[3:]],
        node.attributes,
        domain=DOMAIN,
        name=node.name,
    )
    (y,), (replaced,) = projected.outputs, node.outputs
    y.name, y.type, y.shape = replaced.name, replaced.type, replaced.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], [projected], [replaced], [y])

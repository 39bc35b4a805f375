"""Decompose the attention of site metrics, for a runtime that cannot build it."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from graph_passes.functions import DOMAIN


class DecomposeMetricsAttention(InPlacePass):
    """Replace `Attention` in `sws.SiteMetrics` by products and a softmax.

    Run it before the function is inlined. `Attention` elsewhere is not changed.

    TensorRT for RTX 1.7 has no kernel for float32 attention, and its builder has ended with SIGSEGV if two
    such nodes depend on each other and share an input, as those of the site metrics do (docs/engines.md).
    After the pass the logits of one attention at a time are materialized.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the function, if the model has it."""
        function, nodes = _attentions(model)
        for node in nodes:
            assert function is not None
            replacement = _decomposed(node)
            function.insert_before(node, replacement)
            ir.convenience.replace_all_uses_with(node.outputs[0], replacement[-1].outputs[0])
            function.remove(node, safe=True)
        return PassResult(model, modified=bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        """`sws.SiteMetrics` has no `Attention`.

        Raises:
            PostconditionError: It has.
        """
        _, nodes = _attentions(model)
        if nodes:
            raise PostconditionError(f"{len(nodes)} Attention nodes are left in {DOMAIN}.SiteMetrics")


def _attentions(model: ir.Model) -> tuple[ir.Function | None, list[ir.Node]]:
    """`sws.SiteMetrics`, if the model has it, and its `Attention` nodes."""
    function = model.functions.get((DOMAIN, "SiteMetrics", ""))
    return function, [node for node in function or () if node.op_type == "Attention"]


def _decomposed(node: ir.Node) -> list[ir.Node]:
    """softmax(scale q kᵀ) v for q, k, v of shape [B, h, T, D]."""
    q, k, v = node.inputs
    scaling = _scaling(node.attributes["scale"], q)
    # Not Transpose and MatMul: ONNX Runtime 1.32 moves the Transpose in front of the Pad of the keys, and
    # then reads beyond the end of a shape.
    scaled = scaling[-1].outputs[0] if scaling else q
    logits = ir.node("Einsum", [scaled, k], {"equation": "bhqd,bhkd->bhqk"})
    weights = ir.node("Softmax", [logits.outputs[0]], {"axis": -1})
    mean = ir.node("MatMul", [weights.outputs[0], v])
    nodes = [*scaling, logits, weights, mean]
    for number, part in enumerate(nodes):
        # Inlining renames only values that have a name, so unnamed ones would collide.
        part.outputs[0].name = f"{node.outputs[0].name}_{part.op_type}_{number}"
    return nodes


def _scaling(scale: ir.Attr, q: ir.Value | None) -> list[ir.Node]:
    """Nodes that multiply queries by the function's attribute `scale`; none for scaled queries (scale 1)."""
    if not scale.is_ref():
        assert scale.as_float() == 1.0
        return []
    attribute = ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT)
    constant = ir.node("Constant", [], {"value_float": attribute})
    return [constant, ir.node("Mul", [q, constant.outputs[0]])]

"""Spell out the attentions of statistics, for a runtime that cannot build them."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from graph_passes.functions import DOMAIN

_FUNCTIONS = ("KeyGuard", "SiteMetrics")


class DecomposeGuardAttention(InPlacePass):
    """Replace `Attention` in `sws.KeyGuard` and `sws.SiteMetrics` by products and a softmax.

    Run before lowering.

    TensorRT-RTX 1.7 has no kernel for float32 attention, and its build ends with SIGSEGV where two of them
    depend on each other and share an input, as those of the fused guard do. Spelled out they store the
    logits of one attention at a time. Attention outside these functions is not touched.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the functions, as far as the model has them and they hold attentions."""
        modified = False
        for name in _FUNCTIONS:
            function = model.functions.get((DOMAIN, name, ""))
            for node in [node for node in function or () if node.op_type == "Attention"]:
                assert function is not None
                replacement = _spelled_out(node)
                function.insert_before(node, replacement)
                ir.convenience.replace_all_uses_with(node.outputs[0], replacement[-1].outputs[0])
                function.remove(node, safe=True)
                modified = True
        return PassResult(model, modified=modified)


def _spelled_out(node: ir.Node) -> list[ir.Node]:
    """softmax(scale q kᵀ) v for q, k, v of shape [B, h, T, D]."""
    q, k, v = node.inputs
    scaling = _scaling(node.attributes["scale"], q)
    # Not Transpose and MatMul: ONNX Runtime 1.32 moves the transposition up through the padding of the keys
    # and then reads a shape beyond its end.
    scaled = scaling[-1].outputs[0] if scaling else q
    logits = ir.node("Einsum", [scaled, k], {"equation": "bhqd,bhkd->bhqk"})
    weights = ir.node("Softmax", [logits.outputs[0]], {"axis": -1})
    mean = ir.node("MatMul", [weights.outputs[0], v])
    nodes = [*scaling, logits, weights, mean]
    for number, part in enumerate(nodes):
        # Inlining keeps apart what has a name.
        part.outputs[0].name = f"{node.outputs[0].name}_{part.op_type}_{number}"
    return nodes


def _scaling(scale: ir.Attr, q: ir.Value | None) -> list[ir.Node]:
    """Nodes that multiply queries by the function's attribute `scale`; none where they are scaled already."""
    if not scale.is_ref():
        assert scale.as_float() == 1.0
        return []
    attribute = ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT)
    constant = ir.node("Constant", [], {"value_float": attribute})
    return [constant, ir.node("Mul", [q, constant.outputs[0]])]

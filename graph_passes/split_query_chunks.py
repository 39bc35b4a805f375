"""Compute large attentions a part of their query rows after the other."""

from fractions import Fraction

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from graph_passes.functions import DOMAIN
from graph_passes.grids import known_tokens

LOGITS = 2**21
"""Logits of one head that a part has, about: 8 MiB in float32 (benchmarks/query_rows.py)."""
MOST_PARTS = 16


class SplitQueryChunks(InPlacePass):
    """Give sites of many tokens functions whose `Attention` nodes each take a part of the query rows.

    Rows do not depend on each other. ONNX Runtime's `Attention` on a CPU stores the logits of all its rows;
    those of a part take less memory, and are still in the cache when the softmax and the product with the
    values read them (docs/performance.md). Run it after `SetStaticShapes` and before
    `LowerFunctions`: sites on a grid of unknown size stay as they are, and so do attentions
    whose heads are together, and cross-attention, which has few keys.
    """

    def __init__(self, guard_rows: Fraction = Fraction(1), logits: int = LOGITS) -> None:
        """Make parts of about `logits` logits a head; the key guard sees `guard_rows` of the rows."""
        super().__init__()
        self.guard_rows = guard_rows
        self.logits = logits

    def call(self, model: ir.Model) -> PassResult:
        """Replace the calls of functions of large sites by calls of split ones."""
        modified = False
        for node in model.graph:
            if (node.domain, node.op_type, node.overload) == (DOMAIN, "Attention", ""):
                node.overload = self._split_function(model, node.op_type, known_tokens(node.inputs[3]) ** 2)
                modified |= node.overload != ""
        return PassResult(model, modified=modified)

    def _split_function(self, model: ir.Model, name: str, logits: float) -> str:
        """The overload of `sws.<name>` with its attentions in parts, made where it is missing.

        It is that of the function itself where a single part is enough.
        """
        parts = min(round(logits / self.logits), MOST_PARTS)
        if parts <= 1:
            return ""
        overload = f"in_{parts}_parts"
        if (DOMAIN, name, overload) not in model.functions:
            function = model.functions[DOMAIN, name, ""].clone()
            function.overload = overload
            for node in list(ir.traversal.RecursiveGraphIterator(function.graph)):
                if (node.domain, node.op_type) == ("", "Attention") and "q_num_heads" not in node.attributes:
                    _split(node, parts)
                elif (node.domain, node.op_type) == (DOMAIN, "KeyGuard"):
                    node.overload = self._split_function(model, "KeyGuard", logits * float(self.guard_rows))
            model.functions[function.identifier()] = function
        return overload


def _split(node: ir.Node, parts: int) -> None:
    """Replace an `Attention` on [B, h, T, D] by `parts` of them."""
    graph, (q, k, v), (y,) = node.graph, node.inputs, node.outputs
    assert graph is not None
    rows = ir.node("Split", [q], {"axis": 2, "num_outputs": parts}, num_outputs=parts)
    attentions = [ir.node("Attention", [part, k, v], node.attributes) for part in rows.outputs]
    joined = ir.node("Concat", [part.outputs[0] for part in attentions], {"axis": 2})
    for number, (part, attention) in enumerate(zip(rows.outputs, attentions, strict=True)):
        # Inlining keeps apart what has a name.
        part.name, attention.outputs[0].name = f"{y.name}_rows_{number}", f"{y.name}_part_{number}"
    joined.outputs[0].name, joined.outputs[0].type = y.name, y.type
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [rows, *attentions, joined], [y], joined.outputs
    )

"""Compute large attention on one chunk of the query rows after another."""

from fractions import Fraction

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from graph_passes.conditions import ensure_defined
from graph_passes.functions import DOMAIN
from graph_passes.grids import static_tokens

CHUNK_LOGITS = 2**21
"""Logits of one head in a chunk, about: 8 MiB in float32 (benchmarks/query_rows.py)."""
MAX_CHUNKS = 16


class SplitQueryChunks(InPlacePass):
    """Partition the query rows of sites with many tokens: one `Attention` node for each chunk.

    Rows are independent. ONNX Runtime's `Attention` on a CPU materializes the logits of all rows; those of a
    chunk take less memory, and are still in the cache when the softmax and the product with the values read
    them (docs/performance.md). Run it after `SetStaticShapes` and before `LowerFunctions`. Not partitioned
    are sites on a grid with dynamic shapes, `Attention` nodes that split the heads themselves, and
    cross-attention, which has few keys.
    """

    def __init__(self, guard_rows: Fraction = Fraction(1), chunk_logits: int = CHUNK_LOGITS) -> None:
        """Use chunks of about `chunk_logits` logits; the key guard evaluates `guard_rows` of the rows."""
        super().__init__()
        self.guard_rows = guard_rows
        self.chunk_logits = chunk_logits

    def call(self, model: ir.Model) -> PassResult:
        """Replace the calls of functions of large sites by calls of partitioned ones."""
        modified = False
        for node in model.graph:
            if (node.domain, node.op_type, node.overload) == (DOMAIN, "Attention", ""):
                node.overload = self._partitioned_function(model, node.op_type, _logits(node))
                modified |= node.overload != ""
        return PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        """No self-attention site has more logits than a chunk, as far as its shapes are static, and the model
        has all functions that are called.

        Raises:
            PostconditionError: Names the first call of another kind.
        """
        for node in model.graph:
            if node.op_identifier() == (DOMAIN, "Attention", "") and self._chunks(_logits(node)) > 1:
                raise PostconditionError(f"node {node.name}: its query rows are not partitioned")
        ensure_defined(model)

    def _chunks(self, logits: float) -> int:
        """Chunks of a site with so many logits per head."""
        return min(round(logits / self.chunk_logits), MAX_CHUNKS)

    def _partitioned_function(self, model: ir.Model, name: str, logits: float) -> str:
        """The overload of `sws.<name>` with its query rows partitioned, added to the model if it is missing.

        The empty overload, the function itself, if a single chunk is enough.
        """
        chunks = self._chunks(logits)
        if chunks <= 1:
            return ""
        overload = f"query_chunks_{chunks}"
        if (DOMAIN, name, overload) not in model.functions:
            function = model.functions[DOMAIN, name, ""].clone()
            function.overload = overload
            for node in list(ir.traversal.RecursiveGraphIterator(function.graph)):
                if (node.domain, node.op_type) == ("", "Attention") and "q_num_heads" not in node.attributes:
                    _partition(node, chunks)
                elif (node.domain, node.op_type) == (DOMAIN, "KeyGuard"):
                    node.overload = self._partitioned_function(
                        model, "KeyGuard", logits * float(self.guard_rows)
                    )
            model.functions[function.identifier()] = function
        return overload


def _logits(site: ir.Node) -> int:
    """Logits of a head of a site, T²; 0 if its grid has dynamic shapes."""
    return static_tokens(site.inputs[3]) ** 2


def _partition(node: ir.Node, chunks: int) -> None:
    """Replace an `Attention` on [B, h, T, D] by `chunks` of them."""
    graph, (q, k, v), (y,) = node.graph, node.inputs, node.outputs
    assert graph is not None
    rows = ir.node("Split", [q], {"axis": 2, "num_outputs": chunks}, num_outputs=chunks)
    attentions = [ir.node("Attention", [chunk, k, v], node.attributes) for chunk in rows.outputs]
    joined = ir.node("Concat", [attention.outputs[0] for attention in attentions], {"axis": 2})
    for number, (chunk, attention) in enumerate(zip(rows.outputs, attentions, strict=True)):
        # Inlining renames only values that have a name, so unnamed ones would collide.
        chunk.name, attention.outputs[0].name = f"{y.name}_rows_{number}", f"{y.name}_chunk_{number}"
    joined.outputs[0].name, joined.outputs[0].type = y.name, y.type
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [rows, *attentions, joined], [y], joined.outputs
    )

"""Choose how a banded transport is applied, by the size of its grid."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from graph_passes.activation_dtype import activation_dtype
from graph_passes.functions import DOMAIN
from graph_passes.functions.dense_transport import build_dense_transport
from graph_passes.grids import known_tokens

DENSE_TOKENS = 1024
"""Tokens of the largest grid on which the dense product is the faster one (benchmarks/transport.py)."""


class ChooseTransport(InPlacePass):
    """Replace `sws.BandedTransport` by `sws.DenseTransport` where the grid is known and small.

    Run it when calls of `sws.BandedTransport` stand in the graph itself. Grids whose size is not known keep
    their tiles.
    """

    def __init__(self, dense_tokens: int = DENSE_TOKENS) -> None:
        """Use the dense product on grids of up to `dense_tokens` tokens."""
        super().__init__()
        self.dense_tokens = dense_tokens

    def call(self, model: ir.Model) -> PassResult:
        """Replace the calls; nothing changes where there are none to replace."""
        chosen = [node for node in model.graph if self._is_small(node)]
        if not chosen:
            return PassResult(model, modified=False)
        dtype = activation_dtype(model)
        function = build_dense_transport(dtype)
        model.functions[function.identifier()] = function
        for node in chosen:
            dense = ir.node(
                function.name, node.inputs, domain=DOMAIN, name=node.name, num_outputs=len(node.outputs)
            )
            for value, replaced in zip(dense.outputs, node.outputs, strict=True):
                value.name = replaced.name
            ir.convenience.replace_nodes_and_values(
                model.graph, node, [node], [dense], node.outputs, dense.outputs
            )
        return PassResult(model, modified=True)

    def _is_small(self, node: ir.Node) -> bool:
        if (node.domain, node.op_type) != (DOMAIN, "BandedTransport"):
            return False
        return 0 < known_tokens(node.inputs[0]) <= self.dense_tokens

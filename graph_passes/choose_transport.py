"""Choose between two implementations of a banded transport by the size of its grid."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from graph_passes.activation_dtype import activation_dtype
from graph_passes.conditions import require_lowered
from graph_passes.functions import DOMAIN
from graph_passes.functions.building import add_function
from graph_passes.functions.dense_transport import build_dense_transport
from graph_passes.grids import static_tokens

DENSE_TOKENS = 1024
"""Tokens of the largest grid on which the dense product is faster (benchmarks/transport.py)."""


class ChooseTransport(InPlacePass):
    """Replace `sws.BandedTransport` by `sws.DenseTransport` on small grids with static shapes.

    Calls of `sws.BandedTransport` in the main graph are replaced, not those inside of other functions, so
    `sws.Attention` must be inlined before. A grid with dynamic shapes keeps `sws.BandedTransport`.
    """

    def __init__(self, dense_tokens: int = DENSE_TOKENS, *, joined: bool = True) -> None:
        """Use the dense product on grids of up to `dense_tokens` tokens; `joined` as for the function."""
        super().__init__()
        self.dense_tokens = dense_tokens
        self.joined = joined

    def requires(self, model: ir.Model) -> None:
        """No other function of domain `sws` is left that could call a transport (`require_lowered`)."""
        require_lowered(model, {"BandedTransport", "DenseTransport"})

    def call(self, model: ir.Model) -> PassResult:
        """Replace the calls."""
        calls = [node for node in model.graph if self._is_call_on_small_grid(node)]
        if not calls:
            return PassResult(model, modified=False)
        dtype = activation_dtype(model)
        function = build_dense_transport(dtype, joined=self.joined)
        add_function(model, function)
        for node in calls:
            dense = ir.node(
                function.name, node.inputs, domain=DOMAIN, name=node.name, num_outputs=len(node.outputs)
            )
            for value, replaced in zip(dense.outputs, node.outputs, strict=True):
                value.name = replaced.name
            ir.convenience.replace_nodes_and_values(
                model.graph, node, [node], [dense], node.outputs, dense.outputs
            )
        return PassResult(model, modified=True)

    def _is_call_on_small_grid(self, node: ir.Node) -> bool:
        if (node.domain, node.op_type) != (DOMAIN, "BandedTransport"):
            return False
        return 0 < static_tokens(node.inputs[0]) <= self.dense_tokens

"""Lower the SWS functions to what a target understands."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, Sequential, common

from graph_passes.errors import GraphError
from graph_passes.functions import DOMAIN

PLUGIN_OPERATORS = frozenset({"BandedTransport", "KeyGuard"})
"""Operators of domain `sws` that the TensorRT plugin library implements."""


class LowerFunctions(InPlacePass):
    """Inline functions of domain `sws`, except those named in `kept`.

    Kept functions stay defined in the model beside their calls, so that a runtime without the plugin can
    still run the graph. Calls of functions of other domains are left alone.
    """

    def __init__(self, kept: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.kept = kept

    def call(self, model: ir.Model) -> PassResult:
        """Inline until only kept functions are called."""
        result = common.InlinePass(
            criteria=lambda function: function.domain == DOMAIN and function.name not in self.kept
        )(model)
        Sequential(common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass())(model)
        check_lowered(model, self.kept)
        return PassResult(model, modified=result.modified)


def check_lowered(model: ir.Model, kept: frozenset[str] = frozenset()) -> None:
    """Refuse a graph in which a node of domain `sws`, a Loop or a Scan is left.

    An If is no loop: a step never takes longer than all its branches together.

    Raises:
        GraphError: Names the first such node.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain == DOMAIN and node.op_type not in kept:
            raise GraphError(f"node {node.name}: {DOMAIN}.{node.op_type} is left after lowering")
        if node.domain == "" and node.op_type in ("Loop", "Scan"):
            raise GraphError(f"node {node.name}: {node.op_type} would make the step's length depend on data")

"""Lower the SWS functions to the operators that a target supports."""

from collections.abc import Set

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, Sequential, common

from graph_passes.conditions import remaining_call
from graph_passes.functions import DOMAIN


class LowerFunctions(InPlacePass):
    """Inline functions of domain `sws`, except those named in `kept`.

    Kept functions stay defined in the model beside their calls, so that a runtime without the plugin can
    still run the graph. Calls of functions of other domains are left alone.
    """

    def __init__(self, kept: Set[str] = frozenset()) -> None:
        super().__init__()
        self.kept = kept

    def call(self, model: ir.Model) -> PassResult:
        """Inline until only kept functions are called."""
        result = common.InlinePass(
            criteria=lambda function: function.domain == DOMAIN and function.name not in self.kept
        )(model)
        Sequential(common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass())(model)
        return PassResult(model, modified=result.modified)

    def ensures(self, model: ir.Model) -> None:
        """No node of domain `sws` is left except calls of kept functions, and no Loop or Scan.

        Raises:
            PostconditionError: Names the first such node.
        """
        node = remaining_call(model, self.kept)
        if node is not None:
            raise PostconditionError(f"node {node.name}: {DOMAIN}.{node.op_type} is left after lowering")
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.domain == "" and node.op_type in ("Loop", "Scan"):
                raise PostconditionError(f"node {node.name}: a function was lowered to a {node.op_type}")

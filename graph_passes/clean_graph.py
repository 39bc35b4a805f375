"""Remove what a rewritten graph does not need, and what would make its bytes depend on the machine."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common


class CleanGraph(InPlacePass):
    """Share constants and common subexpressions, drop dead nodes and the exporter's notes.

    Notes hold stack traces with paths of this machine. Names, shapes and the order of inputs and outputs
    stay.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Run the clean-up passes; reports whether any changed the graph."""
        passes = [
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.DeduplicateInitializersPass(size_limit=2**20),
            common.CommonSubexpressionEliminationPass(),
            common.IdentityEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.ClearMetadataAndDocStringPass(),
            common.TopologicalSortPass(),
            common.NameFixPass(),
        ]
        modified = False
        for clean in passes:
            modified |= clean(model).modified
        return PassResult(model, modified=modified)

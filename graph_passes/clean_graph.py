"""Remove what a rewritten graph does not need, and what would make its bytes depend on the machine."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common


class CleanGraph(InPlacePass):
    """Share constants and common subexpressions, drop dead nodes and the exporter's notes.

    Notes hold stack traces with paths of this machine. Names, shapes and the order of inputs and outputs
    stay, and so do properties of the model that are not torch's: those list symbols in the order of a set,
    which differs from run to run.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Run the clean-up passes; reports whether any changed the graph."""
        passes = [
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.LiftSubgraphInitializersToMainGraphPass(),
            common.DeduplicateInitializersPass(size_limit=2**20),
            common.CommonSubexpressionEliminationPass(),
            _DropIdentities(),
            common.RemoveUnusedNodesPass(),
            common.ClearMetadataAndDocStringPass(),
            _ClearNotes(),
            common.TopologicalSortPass(),
            common.NameFixPass(),
        ]
        modified = False
        for clean in passes:
            modified |= clean(model).modified
        return PassResult(model, modified=modified)


class _DropIdentities(InPlacePass):
    """Bypass Identity nodes, except those that make an output of the graph.

    onnx_ir's own pass renames the input of such a node, which loses a name where one value makes two outputs.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in model.graph:
            source = node.inputs[0] if node.op_type == "Identity" and node.domain == "" else None
            if source is None or node.outputs[0].is_graph_output():
                continue
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            model.graph.remove(node, safe=True)
            modified = True
        return PassResult(model, modified=modified)


class _ClearNotes(InPlacePass):
    """Clear the notes of the model and of its values, which onnx_ir's own pass leaves."""

    def call(self, model: ir.Model) -> PassResult:
        modified = bool(model.doc_string)
        model.doc_string = None
        for key in [key for key in model.metadata_props if key.startswith("pkg.torch.")]:
            del model.metadata_props[key]
            modified = True
        values = [*model.graph.inputs, *model.graph.initializers.values()]
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            values += node.outputs
        for value in values:
            modified |= bool(value.metadata_props or value.doc_string)
            value.metadata_props.clear()
            value.doc_string = None
        return PassResult(model, modified=modified)

"""Remove unused and duplicate parts of a rewritten graph, and metadata that depends on the machine."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, common

from graph_passes.conditions import remaining_constant

_DEDUPLICATED_ELEMENTS = 2**20
_BEGINNING_ELEMENTS = 64


class CleanGraph(InPlacePass):
    """Deduplicate constants and subexpressions, remove unused nodes and the metadata of torch's exporter.

    That metadata has stack traces with local paths, and lists symbols in the order of a set, which differs
    from run to run. Names, shapes and order of inputs and outputs are preserved, and so are properties of
    the model that are not torch's.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Run the passes in order."""
        passes = [
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.LiftSubgraphInitializersToMainGraphPass(),
            _DeduplicateInitializers(),
            common.CommonSubexpressionEliminationPass(),
            _RemoveIdentities(),
            common.RemoveUnusedNodesPass(),
            common.ClearMetadataAndDocStringPass(),
            _ClearMetadata(),
            common.TopologicalSortPass(),
            common.NameFixPass(),
        ]
        modified = False
        for clean in passes:
            modified |= clean(model).modified
        return PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        """All constants are initializers of the main graph, and every node is used.

        Raises:
            PostconditionError: Names the first node or initializer of another kind.
        """
        node = remaining_constant(model)
        if node is not None:
            raise PostconditionError(f"node {node.name}: a Constant is left")
        for graph in model.graphs():
            if graph is not model.graph and graph.initializers:
                raise PostconditionError(f"initializer {next(iter(graph.initializers))} is in a branch")
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                raise PostconditionError(f"node {node.name}: none of its outputs is used")


class _DeduplicateInitializers(InPlacePass):
    """Remove initializers of up to 2^20 elements that equal an earlier one.

    onnx_ir's own pass holds a copy of all of them in memory, 0.3 GB for SD1.5. This one reads the beginning
    of each, and all of those that have dtype, shape and beginning in common.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for graph in model.graphs():
            kept: dict[tuple[ir.DataType, tuple[int, ...], bytes], list[ir.Value]] = {}
            for name, value in tuple(graph.initializers.items()):
                tensor = value.const_value
                if tensor is None or tensor.size > _DEDUPLICATED_ELEMENTS or tensor.dtype.is_string():
                    continue
                if value.is_graph_input() or value.is_graph_output():
                    continue
                beginning = tensor.numpy().reshape(-1)[:_BEGINNING_ELEMENTS].tobytes()
                alike = kept.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), beginning), [])
                equal = next((other for other in alike if _same_bytes(other, tensor)), None)
                if equal is None:
                    alike.append(value)
                else:
                    ir.convenience.replace_all_uses_with(value, equal)
                    del graph.initializers[name]
                    modified = True
        return PassResult(model, modified=modified)


def _same_bytes(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    return value.const_value is not None and value.const_value.tobytes() == tensor.tobytes()


class _RemoveIdentities(InPlacePass):
    """Remove Identity nodes, except those whose output is an output of the graph.

    onnx_ir's own pass renames the input of such a node; if one value is two outputs, a name is lost.
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


class _ClearMetadata(InPlacePass):
    """Clear the metadata of the model and of its values, which onnx_ir's own pass does not clear."""

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

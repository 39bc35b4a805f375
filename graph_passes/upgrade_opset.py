"""Convert a graph of an older opset to the one that has `Attention`."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError
from onnxscript import version_converter

from graph_passes.errors import GraphError

OLDEST = 17
"""The first opset with LayerNormalization; older exports decompose it into many nodes."""

# Operators whose axes became an input with opset 18.
_REDUCTIONS = frozenset(
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)


class UpgradeOpset(InPlacePass):
    """Convert a graph of opset 17 or later to `target`, unless it has that or a later one.

    The step from 17 to 18 is made here: it changes the axes of reductions and the outputs of `Split`. The
    others are onnxscript's.
    """

    def __init__(self, target: int) -> None:
        """Convert to opset `target`."""
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> PassResult:
        """Convert the graph.

        Raises:
            GraphError: The graph is older than opset 17, or has an operator without a conversion.
        """
        found = model.graph.opset_imports.get("", 0)
        if found >= self.target:
            return PassResult(model, modified=False)
        if found < OLDEST:
            raise GraphError(f"expected opset {OLDEST} or later, found {found}")
        if found == OLDEST:
            for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
                _to_opset_18(node)
            model.graph.opset_imports[""] = OLDEST + 1
        try:
            version_converter.convert_version(model, target_version=self.target)
        except Exception as error:  # onnxscript's errors have no common base class
            raise GraphError(f"opset {found} cannot be converted to {self.target}: {error}") from error
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """The graph has the opset `target` or a later one: onnxscript's conversion may leave it as it was.

        Raises:
            PostconditionError: It has an older one.
        """
        found = model.graph.opset_imports.get("", 0)
        if found < self.target:
            raise PostconditionError(f"expected opset {self.target} after the conversion, found {found}")


def _to_opset_18(node: ir.Node) -> None:
    if node.domain not in ("", "ai.onnx"):
        return
    node.version = None
    if node.op_type in _REDUCTIONS and "axes" in node.attributes:
        axes = ir.node("Constant", [], {"value_ints": list(node.attributes.pop("axes").as_ints())})
        axes.outputs[0].name = f"{node.outputs[0].name}_axes"
        assert node.graph is not None
        node.graph.insert_before(node, axes)
        node.resize_inputs(2)
        node.replace_input_with(1, axes.outputs[0])
    if node.op_type == "Split" and (len(node.inputs) < 2 or node.inputs[1] is None):
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))

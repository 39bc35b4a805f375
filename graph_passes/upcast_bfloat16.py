"""Upcast a bfloat16 graph to float32, for runtimes without bfloat16."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

_BF16 = ir.DataType.BFLOAT16
_FLOAT = ir.DataType.FLOAT


class UpcastBfloat16(InPlacePass):
    """Make the model a float32 copy of the bfloat16 graph: the same nodes, the same rounded weights.

    Initializers stay bfloat16, wherever they are stored, and are cast in front of the nodes that use them.
    The copy does not round activations; in everything else it computes the same.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Upcast inputs, Cast nodes, constants and the declared types of all values; cast initializers."""
        modified = False
        for value in model.graph.inputs:
            modified |= _upcast_value(value)
        casts: dict[tuple[ir.Graph | ir.Function | None, ir.Value], ir.Node] = {}
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            for output in node.outputs:
                modified |= _upcast_value(output)
            modified |= _upcast_attributes(node)
            modified |= _cast_initializers(node, casts)
        return PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        """No input and no result of a node is bfloat16.

        Raises:
            PostconditionError: Names the first value that is.
        """
        results = (
            value for node in ir.traversal.RecursiveGraphIterator(model.graph) for value in node.outputs
        )
        for value in (*model.graph.inputs, *results):
            if value.dtype == _BF16:
                raise PostconditionError(f"value {value.name} is bfloat16 after upcasting")


def _upcast_value(value: ir.Value) -> bool:
    if value.dtype != _BF16:
        return False
    value.dtype = _FLOAT
    return True


def _upcast_attributes(node: ir.Node) -> bool:
    modified = False
    for name, attribute in list(node.attributes.items()):
        if name == "to" and attribute.value == int(_BF16):
            node.attributes[name] = ir.AttrInt64(name, int(_FLOAT))
            modified = True
        elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _BF16:
            upcast = ir.tensor(attribute.as_tensor().numpy().astype("float32"))
            node.attributes[name] = ir.AttrTensor(name, upcast)
            modified = True
    return modified


def _cast_initializers(
    node: ir.Node, casts: dict[tuple[ir.Graph | ir.Function | None, ir.Value], ir.Node]
) -> bool:
    """Cast the bfloat16 initializers that `node` uses; one Cast serves all nodes of a graph."""
    if node.op_type == "Cast":
        return False
    modified = False
    for place, value in enumerate(node.inputs):
        if value is None or not value.is_initializer() or value.dtype != _BF16:
            continue
        if (node.graph, value) not in casts:
            cast = ir.node("Cast", [value], {"to": int(_FLOAT)}, name=f"{value.name}/Cast")
            cast.outputs[0].name = f"{value.name}/Cast"
            cast.outputs[0].type = ir.TensorType(_FLOAT)
            cast.outputs[0].shape = value.shape
            assert node.graph is not None
            node.graph.insert_before(node, cast)
            casts[node.graph, value] = cast
        node.replace_input_with(place, casts[node.graph, value].outputs[0])
        modified = True
    return modified

"""Turn bfloat16 into float32, for runtimes that cannot compute in bfloat16."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

_BF16 = ir.DataType.BFLOAT16
_FLOAT = ir.DataType.FLOAT


class WidenBfloat16(InPlacePass):
    """Make the float32 twin of a bfloat16 graph: the same nodes and the same, rounded, weights.

    Initializers are widened when they are read. What the twin does not show is the rounding of
    activations; everything else of the graph is exercised.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Widen inputs, initializers, casts and the declared types of all values."""
        modified = False
        for value in (*model.graph.inputs, *model.graph.initializers.values()):
            modified |= _widen_value(value)
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            for output in node.outputs:
                modified |= _widen_value(output)
            modified |= _widen_attributes(node)
        return PassResult(model, modified=modified)


def _widen_value(value: ir.Value) -> bool:
    modified = value.dtype == _BF16
    if modified:
        value.dtype = _FLOAT
    if value.const_value is not None and value.const_value.dtype == _BF16:
        value.const_value = _widened(value.const_value)
        modified = True
    return modified


def _widen_attributes(node: ir.Node) -> bool:
    modified = False
    for name, attribute in list(node.attributes.items()):
        if name == "to" and attribute.value == int(_BF16):
            node.attributes[name] = ir.AttrInt64(name, int(_FLOAT))
            modified = True
        elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _BF16:
            node.attributes[name] = ir.AttrTensor(name, _widened(attribute.as_tensor()))
            modified = True
    return modified


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def widen() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype("float32"), name=tensor.name)

    return ir.LazyTensor(widen, dtype=_FLOAT, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)

"""Find the linear layers and convolutions of a UNet, and those of them that can be quantized."""

import dataclasses

import onnx_ir as ir

MIN_WEIGHTS = 4096
"""Elements of the smallest weight that is quantized: a smaller one saves less than a page of memory."""
_CONDITIONS = ("sample", "encoder_hidden_states")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer or convolution.

    Attributes:
        name: Path of its module, such as `mid_block.resnets.0.conv1`.
        node: The `MatMul`, `Gemm` or `Conv` node.
        weight: Its weight, an initializer.
        axis: Axis of the output channels in the weight.
    """

    name: str
    node: ir.Node
    weight: ir.Value
    axis: int


@dataclasses.dataclass(frozen=True)
class SkippedLayer:
    """A layer that keeps the precision of the graph, and the reason."""

    name: str
    reason: str


def find_layers(model: ir.Model) -> tuple[list[Layer], list[SkippedLayer]]:
    """All layers in graph order: those that can be quantized, and the others with a reason.

    Not quantized are, as in NVIDIA's recipe for UNets (`filter_func_default` in
    `examples/diffusers/quantization/utils.py` of NVIDIA/TensorRT-Model-Optimizer): the first and the last
    convolution, and the embeddings of the timestep and of other conditions. The latter are found by their
    input, which depends on neither the latent nor the text. Products of activations are in neither list.

    Args:
        model: A plain UNet.
    """
    found = [layer for node in model.graph if (layer := _read_layer(node)) is not None]
    convolutions = [layer.node for layer in found if layer.node.op_type == "Conv"]
    computed = _computed_from(model.graph, _CONDITIONS)
    layers: list[Layer] = []
    skipped: list[SkippedLayer] = []
    for layer in found:
        reason = _reason_to_skip(layer, convolutions, computed)
        if reason:
            skipped.append(SkippedLayer(layer.name, reason))
        else:
            layers.append(layer)
    return layers, skipped


def _reason_to_skip(layer: Layer, convolutions: list[ir.Node], computed: set[ir.Value]) -> str:
    if layer.node in convolutions[:1]:
        return "first convolution"
    if layer.node in convolutions[-1:]:
        return "last convolution"
    if layer.node.inputs[0] not in computed:
        return "embedding of the timestep or of another condition"
    assert layer.weight.const_value is not None
    if layer.weight.const_value.size < MIN_WEIGHTS:
        return f"fewer than {MIN_WEIGHTS} weights"
    if any(_read_layer(user) is None for user in _users(layer.weight)):
        return "its weight has other uses"
    return ""


def _read_layer(node: ir.Node) -> Layer | None:
    """The layer of a node; None for other operators and for products of activations."""
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm", "Conv"):
        return None
    weight, axis = node.inputs[1], 0 if node.op_type == "Conv" else 1
    if node.op_type == "Gemm" and node.attributes.get_int("transB"):
        axis = 0
    producer = weight.producer() if weight is not None else None
    if producer is not None and _transposes_matrix(producer):
        weight, axis = producer.inputs[0], 1 - axis
    if weight is None or not weight.is_initializer() or weight.const_value is None:
        return None
    if weight.dtype not in _FLOATS or (node.op_type != "Conv" and len(weight.const_value.shape) != 2):
        return None
    return Layer((node.name or "").strip("/").rpartition("/")[0].replace("/", "."), node, weight, axis)


def _transposes_matrix(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", ())) == (1, 0)


def _users(weight: ir.Value) -> list[ir.Node]:
    """The nodes that use a weight, also through a transposition."""
    users: list[ir.Node] = []
    for node in weight.consumers():
        users += node.outputs[0].consumers() if _transposes_matrix(node) else [node]
    return users


def _computed_from(graph: ir.Graph, inputs: tuple[str, ...]) -> set[ir.Value]:
    """All values that depend on the values of `inputs`, not only on their shapes."""
    found = {value for value in graph.inputs if value.name in inputs}
    for node in graph:
        if node.op_type != "Shape" and not found.isdisjoint(node.inputs):
            found.update(node.outputs)
    return found

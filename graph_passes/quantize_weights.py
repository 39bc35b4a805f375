"""Store the weights of linear layers and convolutions in 8 bits."""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from graph_passes.errors import GraphError
from graph_passes.find_layers import Layer, SkippedLayer, find_layers
from graph_passes.functions.building import add_initializer
from graph_passes.plain_graph import require_plain
from graph_passes.weight_formats import WeightFormat

_BLOCK = 2**22
"""Elements that are quantized at a time: 16 MiB in float32."""


@dataclasses.dataclass(frozen=True)
class Format:
    """The dtype of an 8-bit format, and the largest value that is used."""

    dtype: ir.DataType
    largest: float


FORMATS: dict[WeightFormat, Format] = {
    # Symmetric: -128 is not used.
    "int8": Format(ir.DataType.INT8, 127.0),
    # The format of float8 without infinities, of which 448 is the largest value.
    "fp8": Format(ir.DataType.FLOAT8E4M3FN, 448.0),
}


class QuantizeWeights(InPlacePass):
    """Replace each weight by `DequantizeLinear` of an 8-bit weight, with one scale per output channel.

    The scale of a channel is its largest absolute value divided by the largest value of the format, rounded
    to the precision of the graph. Weights are read and quantized when the graph is saved, one at a time. Run
    it on a plain graph, before SWS is inserted.

    Attributes:
        layers: The layers that the last call quantized.
        skipped: Layers that it left unchanged, with the reason.
    """

    def __init__(self, weights: WeightFormat, exclude: Mapping[str, str] | None = None) -> None:
        """Store the weights as `weights`, except for the layers in `exclude`, which gives the reasons."""
        super().__init__()
        self.weights = weights
        self.exclude = exclude or {}
        self.layers: tuple[Layer, ...] = ()
        self.skipped: tuple[SkippedLayer, ...] = ()

    def requires(self, model: ir.Model) -> None:
        """The graph is plain (`require_plain`): products of SWS are not layers of the UNet."""
        require_plain(model)

    def call(self, model: ir.Model) -> PassResult:
        """Quantize every weight that is large enough.

        Raises:
            GraphError: The graph has no such weight.
        """
        found, skipped = find_layers(model)
        skipped += [
            SkippedLayer(layer.name, self.exclude[layer.name])
            for layer in found
            if layer.name in self.exclude
        ]
        layers = [layer for layer in found if layer.name not in self.exclude]
        if not layers and not is_quantized(model):
            raise GraphError(
                "the graph has no linear layer and no convolution whose weights can be quantized; "
                "leave out --weights"
            )
        for layer in {layer.weight: layer for layer in reversed(layers)}.values():
            _quantize(model.graph, layer, self.weights)
        self.layers, self.skipped = tuple(layers), tuple(skipped)
        return PassResult(model, modified=bool(layers))


def is_quantized(model: ir.Model) -> bool:
    """Whether the graph has 8-bit weights."""
    return any(node.op_type == "DequantizeLinear" and node.domain == "" for node in model.graph)


def _quantize(graph: ir.Graph, layer: Layer, weights: WeightFormat) -> None:
    original, name = layer.weight, str(layer.weight.name)
    assert original.const_value is not None
    values, scales = (
        add_initializer(graph, tensor)
        for tensor in _quantized_tensors(name, original.const_value, layer.axis, weights)
    )
    node = ir.node(
        "DequantizeLinear", [values, scales], {"axis": layer.axis}, name=f"{name}/DequantizeLinear"
    )
    restored = node.outputs[0]
    restored.name, restored.type, restored.shape = f"{name}_dequantized", original.type, original.shape
    users = original.consumers()
    first = min(users, key=list(graph).index) if len(users) > 1 else users[0]
    original.replace_all_uses_with(restored)
    graph.insert_before(first, node)
    del graph.initializers[name]


def _quantized_tensors(
    name: str, weight: ir.TensorProtocol, axis: int, weights: WeightFormat
) -> tuple[ir.LazyTensor, ir.LazyTensor]:
    """The weight `name` in 8 bits and the scale of each channel, computed when they are read."""
    target, precision, dims = FORMATS[weights], weight.dtype.numpy(), weight.shape.numpy()

    def scales() -> ir.TensorProtocol:
        largest = np.concatenate([_largest(block, axis) for block in _blocks(weight, axis)])
        found = (largest / target.largest).astype(precision)
        # A channel of zeros, or one whose scale underflows.
        found[found == 0] = np.finfo(np.float16).smallest_subnormal
        return ir.Tensor(found, name=scale.name)

    def values() -> ir.TensorProtocol:
        shape = [-1 if dimension == axis else 1 for dimension in range(len(dims))]
        divisors = scale.numpy().astype(np.float32)
        found = np.empty(dims, target.dtype.numpy())
        begin = 0
        for block in _blocks(weight, axis):
            end = begin + block.shape[axis]
            scaled = np.clip(block / divisors[begin:end].reshape(shape), -target.largest, target.largest)
            place = (slice(None),) * axis + (slice(begin, end),)
            found[place] = np.rint(scaled) if weights == "int8" else scaled
            begin = end
        return ir.Tensor(found, dtype=target.dtype, name=value.name)

    value = ir.LazyTensor(values, target.dtype, shape=ir.Shape(dims), name=f"{name}_{weights}")
    scale = ir.LazyTensor(
        scales, weight.dtype, shape=ir.Shape([dims[axis]]), name=f"{name}_scale", cache=True
    )
    return value, scale


def _largest(block: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float32]:
    others = tuple(dimension for dimension in range(block.ndim) if dimension != axis)
    return np.asarray(np.abs(block).max(axis=others))


def _blocks(weight: ir.TensorProtocol, axis: int) -> Iterator[npt.NDArray[np.float32]]:
    """Consecutive output channels of a weight in float32."""
    array = weight.numpy()
    channels = array.shape[axis]
    step = max(1, _BLOCK * channels // array.size)
    for begin in range(0, channels, step):
        place = (slice(None),) * axis + (slice(begin, begin + step),)
        yield array[place].astype(np.float32)
    del array
    if isinstance(weight, ir.ExternalTensor):
        # Otherwise every page that was read counts as memory of this process.
        weight.release()


def rounded_weight(weight: ir.TensorProtocol, axis: int, weights: WeightFormat) -> npt.NDArray[np.float32]:
    """The values in float32 that the 8-bit form of a weight stands for."""
    values, scales = _quantized_tensors("", weight, axis, weights)
    shape = [-1 if dimension == axis else 1 for dimension in range(len(weight.shape))]
    return values.numpy().astype(np.float32) * scales.numpy().astype(np.float32).reshape(shape)


def restored_tensor(value: ir.Value, weights: Mapping[str, ir.TensorProtocol]) -> ir.TensorProtocol | None:
    """The 8-bit tensor of the initializer `value`, computed from the weight that it was made from.

    Args:
        value: An initializer that `QuantizeWeights` made.
        weights: The weights of the plain graph by name.

    Returns:
        None if `value` is not the 8-bit form of one of `weights`.
    """
    name, _, weight_format = str(value.name).rpartition("_")
    users = value.consumers()
    if name not in weights or weight_format not in FORMATS or len(users) != 1:
        return None
    axis = users[0].attributes.get_int("axis", 1)
    return _quantized_tensors(name, weights[name], axis, weight_format)[0]

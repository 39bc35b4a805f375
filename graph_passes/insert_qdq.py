"""Quantize the activations that linear layers and convolutions read."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from graph_passes.find_layers import Layer, find_layers
from graph_passes.functions.building import add_initializer
from graph_passes.plain_graph import require_plain
from graph_passes.quantize_weights import FORMATS
from graph_passes.weight_formats import WeightFormat


class InsertQdq(InPlacePass):
    """Insert `QuantizeLinear` and `DequantizeLinear` before layers, with one scale per tensor.

    Outputs of layers stay as they are, so queries, keys, values and what SWS measures keep the precision of
    the graph. Layers that read the same tensor share the nodes. Run it on a plain graph, before
    `QuantizeWeights`, which makes the other operand of the layers 8-bit.
    """

    def __init__(self, activations: WeightFormat, ranges: Mapping[str, float]) -> None:
        """Quantize the inputs of the layers in `ranges`.

        Args:
            activations: Format of the activations.
            ranges: Largest absolute value that is represented, by the name of the layer.
        """
        super().__init__()
        self.activations = activations
        self.ranges = ranges

    def requires(self, model: ir.Model) -> None:
        """The graph is plain (`require_plain`): products of SWS are not layers of the UNet."""
        require_plain(model)

    def call(self, model: ir.Model) -> PassResult:
        """Insert the nodes in front of the first layer that reads a tensor."""
        layers, _ = find_layers(model)
        groups: dict[ir.Value, list[Layer]] = {}
        for layer in layers:
            source = layer.node.inputs[0]
            if source is not None and layer.name in self.ranges and not _is_dequantized(source):
                groups.setdefault(source, []).append(layer)
        for value, readers in groups.items():
            largest = max(self.ranges[layer.name] for layer in readers)
            quantized = self._insert(model.graph, value, readers[0].node, largest)
            for layer in readers:
                layer.node.replace_input_with(0, quantized)
        return PassResult(model, modified=bool(groups))

    def _insert(self, graph: ir.Graph, value: ir.Value, before: ir.Node, largest: float) -> ir.Value:
        """`value` rounded to 8 bits."""
        assert value.dtype is not None
        target, name = FORMATS[self.activations], f"{value.name}/quantized"
        scale = activation_scale(largest, self.activations, value.dtype)
        constants = [
            add_initializer(graph, ir.Tensor(scale, name=f"{name}_scale")),
            add_initializer(graph, _zero(target.dtype, f"{name}_zero")),
        ]
        quantize = ir.node("QuantizeLinear", [value, *constants], name=f"{name}/QuantizeLinear")
        restore = ir.node(
            "DequantizeLinear", [quantize.outputs[0], *constants], name=f"{name}/DequantizeLinear"
        )
        for node, kind in ((quantize, target.dtype), (restore, value.dtype)):
            (output,) = node.outputs
            output.name, output.type, output.shape = f"{node.name}:0", ir.TensorType(kind), value.shape
        graph.insert_before(before, [quantize, restore])
        return restore.outputs[0]


def activation_scale(largest: float, activations: WeightFormat, dtype: ir.DataType) -> npt.NDArray[Any]:
    """The scale, of `dtype`, with which `largest` is the largest value that is represented.

    It is at least the smallest normal float16, also for values that are smaller than the scale then allows.
    """
    scale = np.array(largest / FORMATS[activations].largest, dtype.numpy())
    return np.asarray(np.maximum(scale, np.finfo(np.float16).smallest_normal, dtype=scale.dtype))


def _zero(dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """A zero point, which gives `QuantizeLinear` the dtype of its output."""
    return ir.Tensor(np.zeros((), dtype.numpy()), dtype=dtype, name=name)


def _is_dequantized(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"

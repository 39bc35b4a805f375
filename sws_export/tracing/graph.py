"""Builds the ONNX graph while a module runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from sws_export.tracing.sizes import TraceSizes

# As torch's own exporter writes it.
_IR_VERSION = 10
DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
    torch.int64: ir.DataType.INT64,
}


class GraphBuilder:
    """Appends nodes, named after the torch module that runs; equal nodes are appended once.

    Attributes:
        sizes: The sizes of the run.
        scope: Path of the torch module that runs.
        weights: Values of the weights used so far by name, without data.
    """

    def __init__(self, sizes: TraceSizes) -> None:
        self.sizes = sizes
        self.scope = ""
        self.weights: dict[str, ir.Value] = {}
        self._inputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._nodes_by_key: dict[tuple[Any, ...], ir.Node] = {}
        self._counts: dict[str, int] = {}
        # The first value with each dynamic size, and the axis.
        self._dynamic_sizes: dict[str, tuple[ir.Value, int]] = {}

    def add_input(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """An input of the graph with the dtype and the shape of `tensor`."""
        value = ir.Value(name=name)
        self._describe(value, tensor)
        self._inputs.append(value)
        return value

    def weight(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """The initializer `name`, without data."""
        if name not in self.weights:
            self.weights[name] = value = ir.Value(name=name)
            value.type = ir.TensorType(DTYPES[tensor.dtype])
            value.shape = ir.Shape(tensor.shape)
        return self.weights[name]

    def constant(self, tensor: torch.Tensor) -> ir.Value:
        """An initializer with the values of `tensor`, which is small."""
        data = ir.tensor(tensor.detach().contiguous(), dtype=DTYPES[tensor.dtype])
        key = (tensor.dtype, tuple(tensor.shape), data.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = value = ir.val(name, const_value=_named(data, name))
            value.type, value.shape = ir.TensorType(data.dtype), ir.Shape(tensor.shape)
        return self._constants[key]

    def integers(self, values: Iterable[int]) -> ir.Value:
        """An int64 vector."""
        return self.constant(torch.tensor(list(values), dtype=torch.int64))

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[torch.Tensor | None],
        attributes: Mapping[str, Any] | None = None,
    ) -> Sequence[ir.Value]:
        """The outputs of a node with these inputs.

        `outputs` are meta tensors with the outputs' dtypes and shapes, or None if these are unknown.
        """
        attributes = attributes or {}
        key = (op_type, *map(id, inputs), *sorted(attributes.items()))
        node = self._nodes_by_key.get(key)
        if node is None:
            node = ir.node(
                op_type, inputs, attributes=attributes, num_outputs=len(outputs), name=self._name(op_type)
            )
            for index, (value, tensor) in enumerate(zip(node.outputs, outputs, strict=True)):
                value.name = f"{node.name}:{index}" if index else node.name
                if tensor is not None:
                    self._describe(value, tensor)
            self._nodes_by_key[key] = node
            self._nodes.append(node)
        return node.outputs

    def size_of(self, size: str) -> ir.Value:
        """A dynamic size as an int64 tensor of shape [1]."""
        value, axis = self._dynamic_sizes[size]
        (found,) = self.node("Shape", [value], [None], {"start": axis, "end": axis + 1})
        found.type, found.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        return found

    def finish(self, output: ir.Value, opset: int) -> ir.Graph:
        """The graph; its weights are initializers without data."""
        constants = self._constants.values()
        return ir.Graph(
            self._inputs,
            [output],
            nodes=self._nodes,
            initializers=[*self.weights.values(), *constants],
            opset_imports={"": opset},
            name="unet",
        )

    def _describe(self, value: ir.Value, tensor: torch.Tensor) -> None:
        shape = self.sizes.shape(tensor.shape)
        value.type = ir.TensorType(DTYPES[tensor.dtype])
        value.shape = ir.Shape(shape)
        for axis, size in enumerate(shape):
            if isinstance(size, str):
                self._dynamic_sizes.setdefault(size, (value, axis))

    def _name(self, op_type: str) -> str:
        name = f"{self.scope or 'root'}/{op_type}"
        self._counts[name] = count = self._counts.get(name, 0) + 1
        return name if count == 1 else f"{name}_{count}"


def graph_text(graph: ir.Graph) -> list[str]:
    """A textual form of the graph without the data of weights, for comparing two graphs."""
    nodes = [
        f"{node.op_type} {node.name} {[value and value.name for value in node.inputs]} "
        f"{sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())} "
        f"{[str(value.shape) for value in node.outputs]}"
        for node in graph
    ]
    constants = [
        f"{name} {np.asarray(value.const_value.numpy()).tolist()}"
        for name, value in graph.initializers.items()
        if value.const_value is not None
    ]
    return nodes + constants


def to_model(graph: ir.Graph) -> ir.Model:
    """The model of `graph`."""
    return ir.Model(graph, ir_version=_IR_VERSION)


def _named(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    tensor.name = name
    return tensor

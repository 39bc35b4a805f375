"""One function of domain `sws` in ONNX Runtime."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from graph_passes.clean_graph import CleanGraph
from graph_passes.lower_functions import LowerFunctions

Array = npt.NDArray[np.float32]
FLOAT = ir.DataType.FLOAT


class Call:
    """A function, lowered, with the shapes of its inputs left open where they are given by name."""

    def __init__(
        self,
        functions: dict[str, ir.Function],
        name: str,
        shapes: dict[str, Sequence[int | str]],
        dtype: ir.DataType,
        attributes: dict[str, int | float],
    ) -> None:
        function = functions[name]
        inputs = [
            ir.Value(
                name=value.name, type=value.type, shape=ir.Shape(shapes.get(value.name or "", ["batch"]))
            )
            for value in function.inputs
        ]
        node = ir.node(name, inputs, attributes, domain="sws", num_outputs=len(function.outputs))
        for value, inner in zip(node.outputs, function.outputs, strict=True):
            value.name = inner.name
            value.type = ir.TensorType(dtype)
        graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 23, "sws": 1}, name="call")
        self.model = ir.Model(graph, ir_version=10, functions=list(functions.values()))
        LowerFunctions()(self.model)
        CleanGraph()(self.model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            ir.to_proto(self.model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, **inputs: Array) -> list[Array]:
        """The outputs for `inputs`."""
        return list(self.session.run(None, inputs))

"""One function of domain `sws` in ONNX Runtime."""

import collections
import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

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
        node = ir.node(
            function.name,
            inputs,
            attributes,
            domain="sws",
            overload=function.overload,
            num_outputs=len(function.outputs),
        )
        for value, inner in zip(node.outputs, function.outputs, strict=True):
            value.name = inner.name
            value.type = ir.TensorType(dtype)
        graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 23, "sws": 1}, name="call")
        self.model = ir.Model(graph, ir_version=10, functions=list(functions.values()))
        LowerFunctions()(self.model)
        CleanGraph()(self.model)

    @functools.cached_property
    def session(self) -> onnxruntime.InferenceSession:
        """The graph in ONNX Runtime."""
        return self._open(onnxruntime.SessionOptions())

    def __call__(self, **inputs: Array) -> list[Array]:
        """The outputs for `inputs`."""
        return list(self.session.run(None, inputs))

    def unoptimized(self, **inputs: Array) -> list[Array]:
        """The outputs of the graph as it is, without what ONNX Runtime makes of it."""
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return list(self._open(options).run(None, inputs))

    def executed(self, **inputs: Array) -> collections.Counter[str]:
        """How many nodes of each type run for `inputs`: those of branches that are taken, and no others."""
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        with tempfile.TemporaryDirectory() as folder:
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = self._open(options)
            session.run(None, inputs)
            events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
        return collections.Counter(
            event["args"]["op_name"]
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        )

    def _open(self, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(
            ir.to_proto(self.model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

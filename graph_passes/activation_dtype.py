"""The dtype of a UNet's activations, for which the SWS functions are built."""

import onnx_ir as ir

from graph_passes.errors import GraphError


def activation_dtype(model: ir.Model) -> ir.DataType:
    """The dtype of the graph's first output, the prediction.

    Raises:
        GraphError: The graph does not declare it.
    """
    dtype = model.graph.outputs[0].dtype
    if dtype is None:
        raise GraphError("the dtype of the graph's output is unknown")
    return dtype

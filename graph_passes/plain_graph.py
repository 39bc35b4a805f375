"""What the passes that insert SWS require of a graph."""

import onnx_ir as ir

from graph_passes.errors import GraphError


def require_plain(model: ir.Model) -> None:
    """Raise an error for a graph that SWS cannot be inserted into.

    `If` is allowed: a step never takes longer than all branches together.

    Raises:
        GraphError: The graph has the input `sigma` or `intensity`, so it has SWS already; or it has a Loop or
            Scan node.
    """
    for value in model.graph.inputs:
        if value.name in ("sigma", "intensity"):
            raise GraphError(
                f"the graph has SWS already (input '{value.name}'); start from an export without SWS"
            )
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain == "" and node.op_type in ("Loop", "Scan"):
            raise GraphError(
                f"node {node.name}: the graph has a {node.op_type}, so the length of a step may depend on "
                "data; export the checkpoint with sws-export instead"
            )

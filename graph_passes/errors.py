"""The error that passes raise for a graph that they cannot rewrite."""

from onnx_ir.passes import PreconditionError


class GraphError(PreconditionError):
    """A graph cannot be rewritten; the message has the place, the reason and what to do."""

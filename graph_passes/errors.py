"""The error that passes raise for a graph that they cannot rewrite."""

from onnx_ir.passes import PreconditionError


class GraphError(PreconditionError):
    """A graph cannot be rewritten; the message says where and why, and what to do."""

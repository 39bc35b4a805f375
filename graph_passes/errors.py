"""The error that passes raise when a graph is not what they need."""


class GraphError(ValueError):
    """A graph cannot be rewritten; the message says where and why, and what to do."""

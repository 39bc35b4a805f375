"""The runtimes that a graph is lowered for, and what is different for each."""

import dataclasses
from collections.abc import Mapping

PLUGIN_OPERATORS = frozenset({"BandedTransport", "KeyGuard"})
"""Operators of domain `sws` that the TensorRT plugin library implements."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A runtime that a graph is lowered for.

    Attributes:
        name: As in manifests and on the command line.
        branches: The graph may have `If` nodes: the fused guard skips evaluations that cannot change its
            result. Not for TensorRT, which captures a step as one CUDA graph without branches.
        materialized_logits: Float32 attention is replaced by products and a softmax, which store the logits.
            For TensorRT-RTX, which has no kernel for it.
        split_heads: The heads of a site's own attention are split by Reshape and Transpose nodes. ONNX
            Runtime takes longer to split them itself; TensorRT builds faster if it does.
        query_chunks: Attentions of many tokens are computed on one chunk of the query rows after another.
        plugin_operators: Functions of domain `sws` that stay as nodes, for plugins to implement.
    """

    name: str
    branches: bool = False
    materialized_logits: bool = False
    split_heads: bool = False
    query_chunks: bool = False
    plugin_operators: frozenset[str] = frozenset()


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("onnxruntime", branches=True, split_heads=True, query_chunks=True),
        Target("tensorrt-rtx", materialized_logits=True),
        Target("tensorrt", plugin_operators=PLUGIN_OPERATORS),
    )
}
"""All targets by name."""

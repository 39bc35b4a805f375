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
            result (key_guard_fused.py). Without, it is that of key_guard_means.py. A GPU captures a step
            without branches as one CUDA graph.
        float16_attention: The runtime has fused float16 attention, which the branchless guard then
            uses in a float16 or bfloat16 model.
        float32_attention: The runtime has float32 attention that materializes no logits. Without, the guard
            of a float32 model and the site metrics use products and a softmax.
        costly_shapes: The parser adds layers for the bounds of a Slice and for operands of lower rank. Pad
            and constants of full rank are used where all sizes are known.
        unscaled_attention: The parser has an operator for attention without a scale, see name_attention.py.
            The scale of a site's own attention is then a factor of its queries.
        slow_convolutions: Float32 convolutions with large kernels and few channels are slow; transports copy
            rows instead.
        slow_reductions: Reductions of many elements to few are slow; split_reductions.py replaces those of
            static shapes.
        slow_pads: Zeros are appended by Concat where all sizes are known.
        computes_early: Nodes are computed in an order of the runtime's own, possibly long before their
            results are used. Those that would keep much memory are ordered by `after` of
            functions/building.py.
        split_heads: The heads of a site's own attention are split by Reshape and Transpose nodes. ONNX
            Runtime takes longer to split them itself; TensorRT builds faster if it does.
        query_chunks: Attentions of many tokens are computed on one chunk of the query rows after another.
        plugin_operators: Functions of domain `sws` that stay as nodes, for plugins to implement.
    """

    name: str
    branches: bool = False
    float16_attention: bool = False
    float32_attention: bool = True
    costly_shapes: bool = False
    unscaled_attention: bool = False
    slow_convolutions: bool = False
    slow_reductions: bool = False
    slow_pads: bool = False
    computes_early: bool = False
    split_heads: bool = False
    query_chunks: bool = False
    plugin_operators: frozenset[str] = frozenset()


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("onnxruntime", branches=True, split_heads=True, query_chunks=True),
        Target(
            "onnxruntime-cuda",
            float16_attention=True,
            slow_convolutions=True,
            slow_reductions=True,
            slow_pads=True,
        ),
        Target(
            "tensorrt-rtx",
            float16_attention=True,
            float32_attention=False,
            costly_shapes=True,
            unscaled_attention=True,
            computes_early=True,
        ),
        Target(
            "tensorrt",
            float16_attention=True,
            costly_shapes=True,
            computes_early=True,
            plugin_operators=PLUGIN_OPERATORS,
        ),
    )
}
"""All targets by name."""

"""Partition a graph into consecutive subgraphs, so that no session holds all weights at once.

ONNX Runtime folds operators on constants at load time, such as a cast of float16 weights to float32 or a
transposition. In one session it would therefore hold most of a float32 copy of the model before the first
layer runs. In a subgraph it can only do so for the weights of that subgraph.
"""

from collections.abc import Iterator, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

SUBGRAPH_BYTES = 64 * 2**20
"""Approximate size of the weights in each subgraph."""


def partition_graph(model: ir.Model, limit: int = SUBGRAPH_BYTES) -> list[ir.Model]:
    """Partition `model` into consecutive subgraphs with about `limit` bytes of weights each.

    The inputs of each subgraph are inputs of the graph and outputs of earlier subgraphs. The first subgraph
    computes all state outputs, so that each subgraph can be run for all steps before the next one is loaded.
    Only values of known type cross a boundary between subgraphs.

    Args:
        model: The graph; shapes and types are inferred in place. External weights keep their references.
        limit: Bytes of weights after which a new subgraph starts.
    """
    nodes = list(model.graph)
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    last_use = {value: index for index, node in enumerate(nodes) for value in _inputs(node)}
    last_use |= dict.fromkeys(model.graph.outputs, len(nodes))
    ends = [*_boundaries(nodes, last_use, _end_of_states(model.graph, nodes), limit), len(nodes)]
    if len(ends) == 1:
        return [model]
    return [
        _subgraph(model, nodes[begin:end], [value for value, index in last_use.items() if index >= end])
        for begin, end in zip([0, *ends], ends, strict=False)
    ]


def _inputs(node: ir.Node) -> list[ir.Value]:
    """The values of the graph that a node uses, including those used in its subgraph attributes."""
    inputs = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            branch = attribute.as_graph()
            inner = [value for inner_node in branch for value in _inputs(inner_node)]
            inputs += [value for value in (*inner, *branch.outputs) if value.graph is not branch]
    return inputs


def _end_of_states(graph: ir.Graph, nodes: Sequence[ir.Node]) -> int:
    """Index after the last node that computes a state output."""
    states = {value for value in graph.outputs if str(value.name).startswith("sws_state_")}
    return max(
        (index + 1 for index, node in enumerate(nodes) if states.intersection(node.outputs)), default=0
    )


def _boundaries(
    nodes: Sequence[ir.Node], last_use: dict[ir.Value, int], first: int, limit: int
) -> Iterator[int]:
    """Indices of the nodes that start a new subgraph, none before `first`."""
    weights: set[ir.Value] = set()
    size = 0
    typed_from = 0
    for index, node in enumerate(nodes):
        if size >= limit and index >= max(first, typed_from):
            yield index
            weights, size = set(), 0
        new_weights = {value for value in _inputs(node) if value.const_value is not None} - weights
        weights |= new_weights
        size += sum(value.const_value.nbytes for value in new_weights if value.const_value is not None)
        untyped = [last_use[value] + 1 for value in node.outputs if value.dtype is None and value in last_use]
        typed_from = max([typed_from, *untyped])


def _subgraph(model: ir.Model, nodes: Sequence[ir.Node], used_later: Sequence[ir.Value]) -> ir.Model:
    """`nodes` as a model; those of their outputs that are `used_later` become graph outputs."""
    outputs = {value for node in nodes for value in node.outputs}
    inputs = dict.fromkeys(value for node in nodes for value in _inputs(node))
    graph = ir.GraphView(
        [value for value in inputs if value not in outputs and not value.is_initializer()],
        [value for value in used_later if value in outputs],
        nodes=nodes,
        initializers=[value for value in inputs if value.is_initializer()],
        opset_imports=model.graph.opset_imports,
        name=model.graph.name,
    )
    return ir.Model(graph, ir_version=model.ir_version, functions=tuple(model.functions.values()))  # type: ignore[arg-type]

"""Cut a graph into pieces that run one after the other, so that no runtime holds all its weights at once.

ONNX Runtime may compute early what depends on weights alone, such as float16 weights cast for a processor
without float16, or transposed matrices: left alone it holds most of a float32 copy of the model before the
first layer runs. It cannot look beyond a piece.
"""

from collections.abc import Iterator, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

PIECE_BYTES = 64 * 2**20


def partition_graph(model: ir.Model, limit: int = PIECE_BYTES) -> list[ir.Model]:
    """Cut `model` into consecutive pieces with about `limit` bytes of weights each; infers types in `model`.

    Each piece is a model whose inputs are inputs of the whole and outputs of pieces before it; weights
    outside the ONNX file are referred to as before. All that a state output depends on is in the first piece,
    so that a piece may run for all steps before the next one runs for the first. Cuts go through values of
    known type only.
    """
    nodes = list(model.graph)
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    last_use = {value: place for place, node in enumerate(nodes) for value in _inputs(node)}
    last_use |= dict.fromkeys(model.graph.outputs, len(nodes))
    ends = [*_cuts(nodes, last_use, _end_of_states(model.graph, nodes), limit), len(nodes)]
    if len(ends) == 1:
        return [model]
    return [
        _piece(model, nodes[begin:end], [value for value, place in last_use.items() if place >= end])
        for begin, end in zip([0, *ends], ends, strict=False)
    ]


def _inputs(node: ir.Node) -> list[ir.Value]:
    """What a node takes of its graph, from within its branches too."""
    taken = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            branch = attribute.as_graph()
            inner = [value for inner_node in branch for value in _inputs(inner_node)]
            taken += [value for value in (*inner, *branch.outputs) if value.graph is not branch]
    return taken


def _end_of_states(graph: ir.Graph, nodes: Sequence[ir.Node]) -> int:
    """Position behind the last node that gives a state output."""
    states = {value for value in graph.outputs if str(value.name).startswith("sws_state_")}
    return max(
        (place + 1 for place, node in enumerate(nodes) if states.intersection(node.outputs)), default=0
    )


def _cuts(nodes: Sequence[ir.Node], last_use: dict[ir.Value, int], first: int, limit: int) -> Iterator[int]:
    """Positions of the nodes that begin another piece, none before `first`."""
    weights: set[ir.Value] = set()
    filled = 0
    typed_from = 0
    for place, node in enumerate(nodes):
        if filled >= limit and place >= max(first, typed_from):
            yield place
            weights, filled = set(), 0
        fresh = {value for value in _inputs(node) if value.const_value is not None} - weights
        weights |= fresh
        filled += sum(value.const_value.nbytes for value in fresh if value.const_value is not None)
        untyped = [last_use[value] + 1 for value in node.outputs if value.dtype is None and value in last_use]
        typed_from = max([typed_from, *untyped])


def _piece(model: ir.Model, nodes: Sequence[ir.Node], needed: Sequence[ir.Value]) -> ir.Model:
    """`nodes` as a model; `needed` are the values that are taken after them."""
    made = {value for node in nodes for value in node.outputs}
    taken = dict.fromkeys(value for node in nodes for value in _inputs(node))
    graph = ir.GraphView(
        [value for value in taken if value not in made and not value.is_initializer()],
        [value for value in needed if value in made],
        nodes=nodes,
        initializers=[value for value in taken if value.is_initializer()],
        opset_imports=model.graph.opset_imports,
        name=model.graph.name,
    )
    return ir.Model(graph, ir_version=model.ir_version, functions=tuple(model.functions.values()))  # type: ignore[arg-type]

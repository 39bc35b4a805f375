"""Where a graph is cut, and what each piece takes and gives."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sws_export import ExportOptions, export
from sws_export.validation.partition import partition_graph

FLOAT = ir.DataType.FLOAT


def chain(count: int = 4, operator: str = "Add", domain: str = "") -> ir.Model:
    """x + w0 + w1 + ..., each weight of 400 bytes."""
    x = ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape([100]))
    nodes, weights, value = [], [], x
    for place in range(count):
        tensor = ir.tensor(np.full(100, place, np.float32), name=f"w{place}")
        weight = ir.Value(name=f"w{place}", type=ir.TensorType(FLOAT), shape=tensor.shape, const_value=tensor)
        node = ir.node(operator, [value, weight], domain=domain)
        value = node.outputs[0]
        value.name = f"v{place}"
        nodes.append(node)
        weights.append(weight)
    value.type = ir.TensorType(FLOAT)
    imports = {"": 23} | ({domain: 1} if domain else {})
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports=imports, name="chain")
    return ir.Model(graph, ir_version=10)


def values(piece: ir.Model) -> tuple[list[str | None], list[str | None], list[str | None]]:
    graph = piece.graph
    return [v.name for v in graph.inputs], [v.name for v in graph.outputs], list(graph.initializers)


def test_a_piece_takes_what_it_needs_and_gives_what_is_needed() -> None:
    pieces = partition_graph(chain(4), limit=800)
    assert [values(piece) for piece in pieces] == [
        (["x"], ["v1"], ["w0", "w1"]),
        (["v1"], ["v3"], ["w2", "w3"]),
    ]


def test_few_weights_stay_whole() -> None:
    model = chain(4)
    assert partition_graph(model, limit=1600) == [model]


def test_values_of_unknown_type_are_not_cut() -> None:
    model = chain(4, "Odd", "somebody")
    assert partition_graph(model, limit=400) == [model]
    list(model.graph)[1].outputs[0].type = ir.TensorType(FLOAT)
    assert [values(piece)[1] for piece in partition_graph(model, limit=400)] == [["v1"], ["v3"]]


def test_states_are_made_by_the_first_piece() -> None:
    model = chain(4)
    state = list(model.graph)[2].outputs[0]
    state.name, state.type = "sws_state_d1_out", ir.TensorType(FLOAT)
    model.graph.outputs.append(state)
    first, second = partition_graph(model, limit=400)
    assert values(first) == (["x"], ["sws_state_d1_out"], ["w0", "w1", "w2"])
    assert values(second) == (["sws_state_d1_out"], ["v3"], ["w3"])


def test_a_branch_takes_values_from_outside() -> None:
    model = chain(2)
    first, second = model.graph
    branches = {}
    for name, weight in zip(("then_branch", "else_branch"), ("w0", "w1"), strict=True):
        node = ir.node("Add", [first.outputs[0], model.graph.initializers[weight]])
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(FLOAT)
        branches[name] = ir.Graph([], node.outputs, nodes=[node], name=name)
    condition = ir.Value(name="condition", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    model.graph.inputs.append(condition)
    chosen = ir.node("If", [condition], branches)
    chosen.outputs[0].name, chosen.outputs[0].type = "chosen", ir.TensorType(FLOAT)
    model.graph.insert_after(second, chosen)
    model.graph.outputs.append(chosen.outputs[0])
    pieces = partition_graph(model, limit=400)
    assert values(pieces[-1]) == (["condition", "v0"], ["chosen"], ["w0", "w1"])


@pytest.mark.parametrize("limit", [50_000, 500_000])
def test_pieces_of_a_unet_hold_about_the_limit(random_unet: Path, tmp_path: Path, limit: int) -> None:
    export(random_unet, tmp_path / "graph.onnx", ExportOptions(validate=False))
    model = ir.load(tmp_path / "graph.onnx")
    largest = max(
        v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
    )
    pieces = partition_graph(model, limit)
    assert len(pieces) > 3
    assert sum(len(list(piece.graph)) for piece in pieces) == len(list(model.graph))
    for piece in pieces[1:]:
        held = sum(
            v.const_value.nbytes for v in piece.graph.initializers.values() if v.const_value is not None
        )
        assert held <= limit + 3 * largest

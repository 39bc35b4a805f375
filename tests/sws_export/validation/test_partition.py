"""The boundaries of the subgraphs, and the inputs and outputs of each subgraph."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

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


def names(subgraph: ir.Model) -> tuple[list[str | None], list[str | None], list[str | None]]:
    graph = subgraph.graph
    return [v.name for v in graph.inputs], [v.name for v in graph.outputs], list(graph.initializers)


def test_inputs_outputs_and_weights_of_each_subgraph() -> None:
    subgraphs = partition_graph(chain(4), limit=800)
    assert [names(subgraph) for subgraph in subgraphs] == [
        (["x"], ["v1"], ["w0", "w1"]),
        (["v1"], ["v3"], ["w2", "w3"]),
    ]


def test_a_graph_with_few_weights_is_not_partitioned() -> None:
    model = chain(4)
    assert partition_graph(model, limit=1600) == [model]


def test_values_of_unknown_type_cross_no_boundary() -> None:
    model = chain(4, "Unknown", "custom")
    assert partition_graph(model, limit=400) == [model]
    list(model.graph)[1].outputs[0].type = ir.TensorType(FLOAT)
    assert [names(subgraph)[1] for subgraph in partition_graph(model, limit=400)] == [["v1"], ["v3"]]


def test_the_first_subgraph_computes_the_states() -> None:
    model = chain(4)
    state = list(model.graph)[2].outputs[0]
    state.name, state.type = "sws_state_d1_out", ir.TensorType(FLOAT)
    model.graph.outputs.append(state)
    first, second = partition_graph(model, limit=400)
    assert names(first) == (["x"], ["sws_state_d1_out"], ["w0", "w1", "w2"])
    assert names(second) == (["sws_state_d1_out"], ["v3"], ["w3"])


def test_a_branch_uses_values_of_the_outer_graph() -> None:
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
    subgraphs = partition_graph(model, limit=400)
    assert names(subgraphs[-1]) == (["condition", "v0"], ["chosen"], ["w0", "w1"])


@pytest.mark.parametrize("limit", [50_000, 500_000])
def test_subgraphs_of_a_unet_have_about_limit_bytes_of_weights(sws_graph: Path, limit: int) -> None:
    model = ir.load(sws_graph)
    largest = max(
        v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
    )
    subgraphs = partition_graph(model, limit)
    assert len(subgraphs) > 3
    assert sum(len(list(subgraph.graph)) for subgraph in subgraphs) == len(list(model.graph))
    for subgraph in subgraphs[1:]:
        held = sum(
            v.const_value.nbytes for v in subgraph.graph.initializers.values() if v.const_value is not None
        )
        assert held <= limit + 3 * largest

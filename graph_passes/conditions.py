"""Conditions that several passes require or ensure.

A condition that a user's graph can break raises `GraphError`. All others break only if passes run in another
order than `pipeline.py` has.
"""

from collections.abc import Set

import onnx_ir as ir
from onnx_ir.passes import PostconditionError, PreconditionError

from graph_passes.functions import DOMAIN
from graph_passes.functions.building import OPSET


def require_attention_opset(model: ir.Model) -> None:
    """The graph has an opset with the operator `Attention`, which the functions of domain `sws` use too.

    Raises:
        PreconditionError: `UpgradeOpset` has not run.
    """
    found = model.graph.opset_imports.get("", 0)
    if found < OPSET:
        raise PreconditionError(f"expected opset {OPSET} or later, found {found}")


def remaining_call(model: ir.Model, allowed: Set[str]) -> ir.Node | None:
    """The first call of a function of domain `sws` that is not `allowed`; None if there is none."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain == DOMAIN and node.op_type not in allowed:
            return node
    return None


def require_lowered(model: ir.Model, allowed: Set[str] = frozenset()) -> None:
    """All functions of domain `sws` except those `allowed` are inlined.

    Raises:
        PreconditionError: Names the first call that is left.
    """
    node = remaining_call(model, allowed)
    if node is not None:
        raise PreconditionError(f"node {node.name}: {DOMAIN}.{node.op_type} is not lowered")


def ensure_defined(model: ir.Model) -> None:
    """Each call of a function of domain `sws`, in the graph and in functions, is of one that the model has.

    Raises:
        PostconditionError: Names the first call of another function or overload.
    """
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in ir.traversal.RecursiveGraphIterator(graph):
            if node.domain == DOMAIN and node.op_identifier() not in model.functions:
                overload = f" with the overload {node.overload}" if node.overload else ""
                raise PostconditionError(
                    f"node {node.name}: the model has no function {DOMAIN}.{node.op_type}{overload}"
                )


def remaining_constant(model: ir.Model) -> ir.Node | None:
    """The first Constant node of the graph or a branch; None if all constants are initializers.

    An output of the graph cannot be an initializer.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "Constant" and node.domain == "" and not node.outputs[0].is_graph_output():
            return node
    return None


def require_initializers(model: ir.Model) -> None:
    """All constants are initializers, as `CleanGraph` leaves them.

    Raises:
        PreconditionError: Names the first Constant node.
    """
    node = remaining_constant(model)
    if node is not None:
        raise PreconditionError(f"node {node.name}: a Constant is not an initializer")

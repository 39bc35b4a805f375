"""Move nodes into the branch that alone uses their results."""

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from graph_passes.conditions import require_lowered


class SinkIntoBranches(InPlacePass):
    """Move nodes of the main graph whose results only one branch of an `If` uses into that branch.

    They are then computed only if the branch is taken: the transported keys and values of a site if a sample
    has an amplitude. Nodes that several sites share stay in the main graph. Run it last: shape
    inference and the elimination of common subexpressions act on the main graph only.
    """

    def requires(self, model: ir.Model) -> None:
        """All functions of domain `sws` are lowered (`require_lowered`): the branches are in them."""
        require_lowered(model)

    def call(self, model: ir.Model) -> PassResult:
        """Move nodes, the last ones first."""
        branches: dict[ir.Graph | None, ir.Graph] = {
            graph: branch
            for node in model.graph
            for branch in _subgraphs(node)
            for graph in (branch, *branch.subgraphs())
        }
        modified = False
        for node in reversed(list(model.graph)):
            branch = _only_user(node, branches)
            if branch is not None:
                model.graph.remove(node)
                branch.insert_before(branch[0], node)
                modified = True
        if modified:
            # A branch may have nodes with the names of those that were moved.
            common.NameFixPass()(model)
        return PassResult(model, modified=modified)


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()


def _only_user(node: ir.Node, branches: dict[ir.Graph | None, ir.Graph]) -> ir.Graph | None:
    """The branch in which all uses of the outputs of `node` are; None if there is no such branch."""
    if any(True for _ in _subgraphs(node)) or any(value.is_graph_output() for value in node.outputs):
        return None
    users = {branches.get(user.graph) for value in node.outputs for user, _ in value.uses()}
    return users.pop() if len(users) == 1 else None

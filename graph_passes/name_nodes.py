"""Name nodes after the module that they were exported from."""

import ast
import collections

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

_SCOPES = "pkg.torch.onnx.name_scopes"


class NameNodes(InPlacePass):
    """Rename nodes to `<module path>/<op type>`, with a number if a module has several of one type.

    The module path is read from the scopes in the metadata of torch's exporter; nodes without scopes keep
    their name. `find_sites` needs these names; Netron and the logs of engines show them.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rename in graph order."""
        modified = False
        counts: collections.Counter[str] = collections.Counter()
        for node in model.graph:
            path = _module_path(node)
            if path is None:
                continue
            name = f"{path}/{node.op_type}"
            counts[name] += 1
            if counts[name] > 1:
                name = f"{name}_{counts[name]}"
            modified |= node.name != name
            node.name = name
        return PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        """Nodes with a module path have distinct names.

        Raises:
            PostconditionError: Names the first two that have not.
        """
        named: dict[str | None, ir.Node] = {}
        for node in model.graph:
            if _SCOPES not in node.metadata_props:
                continue
            other = named.setdefault(node.name, node)
            # Scopes are parsed for equal names only: those of all nodes would take as long as the pass.
            if other is not node and _module_path(node) is not None and _module_path(other) is not None:
                raise PostconditionError(f"two nodes have the name {node.name}")


def _module_path(node: ir.Node) -> str | None:
    """Path below the exported root, without a wrapper called `unet`; None without scopes."""
    scopes_text = node.metadata_props.get(_SCOPES)
    if not scopes_text:
        return None
    scopes = ast.literal_eval(scopes_text)
    if len(scopes) < 2:
        return None
    path = str(scopes[-2]).removeprefix("unet").removeprefix(".")
    return path or "root"

"""Name nodes after the module that they were exported from."""

import ast
import collections

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

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

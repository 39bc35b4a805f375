"""Name nodes after the module they were exported from."""

import ast
import collections

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

_SCOPES = "pkg.torch.onnx.name_scopes"


class NameNodes(InPlacePass):
    """Rename nodes to `<module path>/<op type>`, numbered where a module has several of a type.

    Reads the scopes that torch's exporter leaves on nodes; nodes without scopes keep their name. A graph
    whose notes are removed later still tells in Netron, in engine logs and to `find_sites` what is what.
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
    """Path below the exported root, without a wrapper called `unet`; None where no scope tells."""
    notes = node.metadata_props.get(_SCOPES)
    if not notes:
        return None
    scopes = ast.literal_eval(notes)
    if len(scopes) < 2:
        return None
    path = str(scopes[-2]).removeprefix("unet").removeprefix(".")
    return path or "root"

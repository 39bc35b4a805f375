"""Names of the original (LDM) layout as names of diffusers' modules."""

import re

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

# `input_blocks.3.1`, or `input_blocks.3` and below it `input_blocks.3.1`: torch repeats the name of a
# Sequential that is called as a module.
_BLOCK = re.compile(r"(?:.*\.)?(input|output)_blocks\.(\d+)(?:\.\1_blocks\.\2)?\.(\d+)\.(.*)")
_MIDDLE = re.compile(r"(?:.*\.)?middle_block(?:\.middle_block)?\.(\d+)\.(.*)")


class NameLdmNodes(InPlacePass):
    """Rename the nodes of a UNet in the original layout, as ComfyUI exports it, to diffusers' module paths.

    `input_blocks`, `middle_block` and `output_blocks` become `down_blocks`, `mid_block` and `up_blocks`. A
    level ends at the block with a layer that halves or doubles the size.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rename in graph order; other graphs stay as they are."""
        parts = {node: _dotted(node) for node in model.graph}
        found = {node: match for node, name in parts.items() if (match := _BLOCK.fullmatch(name))}
        if not found:
            return PassResult(model, modified=False)
        resizing: dict[str, set[int]] = {"input": set(), "output": set()}
        for node, match in found.items():
            side, index, _, rest = match.groups()
            if (side == "input" and re.match(r"op\.", rest)) or (
                side == "output" and node.op_type == "Resize"
            ):
                resizing[side].add(int(index))
        for node, name in parts.items():
            if node in found:
                node.name = _with_operator(_renamed(found[node], resizing))
            elif middle := _MIDDLE.fullmatch(name):
                index, rest = middle.groups()
                kind = f"attentions.{int(index) // 2}" if int(index) % 2 else f"resnets.{int(index) // 2}"
                node.name = _with_operator(f"mid_block.{kind}.{rest}")
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """No node is named after a layer of `input_blocks` or `output_blocks`.

        Raises:
            PostconditionError: Names the first such node.
        """
        for node in model.graph:
            if _BLOCK.fullmatch(_dotted(node)):
                raise PostconditionError(f"node {node.name} is named after a block of the original layout")


def _dotted(node: ir.Node) -> str:
    """The name of a node with dots between its parts."""
    return (node.name or "").strip("/").replace("/", ".")


def _with_operator(name: str) -> str:
    """A name whose last part, the operator, is separated by a slash."""
    module, _, operator = name.rpartition(".")
    return f"{module}/{operator}"


def _renamed(match: re.Match[str], resizing: dict[str, set[int]]) -> str:
    side, index, layer, rest = match[1], int(match[2]), int(match[3]), match[4]
    earlier = [block for block in resizing[side] if block < index]
    level = len(earlier)
    # The first input block is the convolution at the input; a block that halves the size ends its level.
    first = max(earlier, default=0 if side == "input" else -1) + 1
    number = max(index - first, 0)
    block = "down_blocks" if side == "input" else "up_blocks"
    if side == "input" and index in resizing[side]:
        return f"{block}.{level}.downsamplers.0.{rest}"
    if rest.startswith(("transformer_blocks.", "proj_", "norm")) and layer == 1:
        return f"{block}.{level}.attentions.{number}.{rest}"
    return f"{block}.{level}.{'resnets' if layer == 0 else 'upsamplers'}.{number}.{rest}"

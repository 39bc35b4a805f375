"""Checks of a graph before TensorRT parses it.

The parser of TensorRT for RTX aborts the process for a node that resolves to a registered plugin, and that
cannot be caught. So every node must be a standard ONNX operator or a call of a function of the model.
"""

from collections.abc import Iterable
from pathlib import Path

import onnx.defs
import onnx_ir as ir

from sws_export.errors import EngineError
from sws_export.onnx_files import load_onnx

_STANDARD_DOMAINS = ("", "ai.onnx")


def check_graph(path: Path, *, custom_operators: bool) -> None:
    """Check the structure of the model at `path` without reading its weights.

    Args:
        path: The ONNX file.
        custom_operators: Whether plugins for custom operators are loaded.

    Raises:
        CheckpointError: The file is missing or not an ONNX model.
        EngineError: External data is missing or truncated, or a node is neither a standard operator nor a
            call of a function of the model.
    """
    model = load_onnx(path)
    _check_external_data(model, path)
    if not custom_operators:
        _check_operators(model, path)


def _check_external_data(model: ir.Model, path: Path) -> None:
    ends: dict[str, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            location = str(tensor.location)
            end = (tensor.offset or 0) + (tensor.length or 0)
            ends[location] = max(end, ends.get(location, 0))
    for location, end in ends.items():
        data = path.parent / location
        if not data.is_file():
            raise EngineError(
                f"the weights of {path} are missing: {data} does not exist; keep both files together"
            )
        size = data.stat().st_size
        if size < end:
            raise EngineError(
                f"the weights of {path} are truncated: {data} has {size} bytes, expected {end}; "
                "copy or export it again"
            )


def _check_operators(model: ir.Model, path: Path) -> None:
    functions = {(domain, name) for domain, name, _ in model.functions}
    bodies: list[Iterable[ir.Node]] = [
        ir.traversal.RecursiveGraphIterator(model.graph),
        *(ir.traversal.RecursiveGraphIterator(function.graph) for function in model.functions.values()),
    ]
    custom = sorted(
        {
            f"{node.domain or 'ai.onnx'}::{node.op_type}"
            for body in bodies
            for node in body
            if (node.domain, node.op_type) not in functions and not _is_standard(node)
        }
    )
    if custom:
        raise EngineError(
            f"{path} has custom operators: {', '.join(custom)}; this backend supports only standard "
            "operators: export the graph for it (--backend tensorrt-rtx), or use --backend tensorrt with the "
            "plugin library"
        )


def _is_standard(node: ir.Node) -> bool:
    return node.domain in _STANDARD_DOMAINS and onnx.defs.has(node.op_type)

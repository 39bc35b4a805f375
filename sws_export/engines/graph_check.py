"""Refusing, before TensorRT's parser sees it, a graph that would abort the process.

The parser of TensorRT for RTX ends the process when a node resolves to a registered plugin, and that can
not be caught. So every node must be a standard operator or a function of the model itself.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from sws_export.errors import EngineError

_STANDARD_DOMAINS = ("", "ai.onnx")


def check_graph(path: Path, *, foreign_operators: bool) -> None:
    """Read the structure of the model at `path`, not its weights, and refuse what the parser cannot take.

    Args:
        path: The ONNX file.
        foreign_operators: Whether plugins are there for operators that are not ONNX's.

    Raises:
        EngineError: The file is missing or not an ONNX model, its external data is missing or cut short, or a
            node is neither a standard operator nor a call of a function of the model.
    """
    model = _read_structure(path)
    _check_external_data(model, path)
    if not foreign_operators:
        _check_operators(model, path)


def _check_external_data(model: onnx.ModelProto, path: Path) -> None:
    ends: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
            ends[entries["location"]] = max(end, ends.get(entries["location"], 0))
    for location, end in ends.items():
        data = path.parent / location
        if not data.is_file():
            raise EngineError(
                f"the weights of {path} are missing: there is no {data}; keep both files together"
            )
        if data.stat().st_size < end:
            raise EngineError(
                f"the weights of {path} are cut short: {data} has {data.stat().st_size} bytes, "
                f"expected {end}; copy or export it again"
            )


def _check_operators(model: onnx.ModelProto, path: Path) -> None:
    functions = {(function.domain, function.name) for function in model.functions}
    bodies: list[Iterable[onnx.NodeProto]] = [
        model.graph.node,
        *(function.node for function in model.functions),
    ]
    foreign = sorted(
        {
            f"{node.domain or 'ai.onnx'}::{node.op_type}"
            for body in bodies
            for node in _nodes(body)
            if (node.domain, node.op_type) not in functions and not _is_standard(node)
        }
    )
    if foreign:
        raise EngineError(
            f"{path} has operators that no standard ONNX runtime knows: {', '.join(foreign)}; "
            "this backend runs standard operators only, so export the graph for it (--backend tensorrt-rtx) "
            "or use --backend tensorrt with the plugin library"
        )


def _read_structure(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise EngineError(f"cannot read the graph {path}: {error.strerror or error}") from error
    except Exception as error:  # protobuf's decoder has several error classes, none of them public
        raise EngineError(f"{path} is not an ONNX model or is damaged ({error}); export it again") from error
    if not model.graph.node:
        raise EngineError(f"{path} is not an ONNX model or is damaged (no nodes); export it again")
    return model


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """All nodes, those in the bodies of If, Loop and Scan included."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)


def _is_standard(node: onnx.NodeProto) -> bool:
    return node.domain in _STANDARD_DOMAINS and onnx.defs.has(node.op_type)

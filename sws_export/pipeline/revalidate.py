"""Compare a graph exported earlier with its checkpoint again."""

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sws_export import manifest
from sws_export.errors import CheckpointError, ValidationError
from sws_export.options.options import ExportOptions
from sws_export.parameters import SwsParameters, recorded_parameters
from sws_export.progress import Progress, Silent
from sws_export.sources.source import open_source
from sws_export.tensors import MID_RESIDUAL
from sws_export.validation import SwsSpec, ValidationReport


def validate(
    graph: Path | str,
    model: Path | str,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> ValidationReport:
    """Run `graph` beside the eager reference on the weights of `model`.

    Args:
        graph: An ONNX file that sws-export wrote; what it was exported with is read from it.
        model: The checkpoint.
        options: How to read the checkpoint.
        progress: Hears of the stages.

    Raises:
        CheckpointError: A file is missing, or the graph was not written by sws-export.
        ValidationError: The checkpoint is not the one that the graph was made from.
    """
    graph, model = Path(graph), Path(model)
    options, progress = options or ExportOptions(), progress or Silent()
    described = _description(graph)
    residuals = any(spec["name"] == MID_RESIDUAL for spec in described["inputs"])
    as_exported = dataclasses.replace(options, precision=described["precision"], controlnet=residuals)
    source = open_source(model, as_exported, progress)
    found = source.verify(progress)
    if found["sha256"] != described["source"]["sha256"]:
        raise ValidationError(
            f"{graph} was exported from {described['source']['file']} with sha256 "
            f"{described['source']['sha256'][:12]}…, {model} has {found['sha256'][:12]}…; "
            "give the checkpoint that it was exported from"
        )
    return source.validate(graph, _shuffled(described), progress)


def _shuffled(described: dict[str, Any]) -> SwsSpec:
    if not described["sws"]:
        return SwsSpec(SwsParameters(), ())
    sites = tuple(name for names in described["sites"].values() for name in names)
    debug_sites = tuple(described.get("debug_outputs", {}).get("sites", ()))
    return SwsSpec(
        recorded_parameters(described["sws"]),
        sites,
        Fraction(described["guard"]["rows"]),
        debug_sites,
        # Graphs from before there were presets do not say.
        described.get("preset", "sws"),
    )


def _description(graph: Path) -> dict[str, Any]:
    if not graph.is_file():
        raise CheckpointError(f"{graph}: no such file")
    try:
        described = manifest.embedded(ir.load(graph))
    except Exception as error:  # protobuf's and onnx_ir's errors share no base class
        raise CheckpointError(f"{graph} is not an ONNX model or is damaged: {error}") from error
    if described is None:
        raise CheckpointError(f"{graph} was not written by sws-export: it does not say what it was made with")
    return described

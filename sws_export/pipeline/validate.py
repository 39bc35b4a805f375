"""Compare a graph with what it should compute: in an export, or one exported earlier."""

import dataclasses
from pathlib import Path

import onnx_ir as ir

from sws_export.errors import CheckpointError, ValidationError
from sws_export.manifest import Manifest, read_embedded
from sws_export.options import ExportOptions, SourceOptions
from sws_export.pipeline.graph import Graph
from sws_export.pipeline.plan import ExportPlan
from sws_export.pipeline.run_log import RunLog
from sws_export.progress import Progress, SilentProgress
from sws_export.sources import open_source
from sws_export.tensors import MID_RESIDUAL
from sws_export.validation import SwsSpec, ValidationReport, require_tolerances


def validate_graph(
    plan: ExportPlan, graph: Graph, log: RunLog, unquantized: ir.Model | None = None
) -> ValidationReport:
    """Compare the graph of an export with what it should compute.

    Args:
        plan: The export.
        graph: Its graph with dynamic shapes.
        log: Receives the stage.
        unquantized: The same graph with its weights as in the source, whose error is reported, too.

    Raises:
        ValidationError: They differ by more than is allowed.
    """
    file, spec = graph.write().path, SwsSpec.from_manifest(graph.description)
    with log.measure("validate"):
        validation = plan.source.validate(file, spec, log, unquantized)
    require_tolerances(validation.outputs, validation.reference, _remedy(plan.options, validation))
    return validation


def _remedy(options: ExportOptions, validation: ValidationReport) -> str:
    """What to do if the graph differs because of its 8 bits."""
    without, quantization = validation.unquantized, options.quantization
    if without is None or not without.passed:
        return ""
    other = "fp8" if quantization.weight_format == "int8" else "int8"
    ways = [f"--weights {other}"]
    if quantization.activations is not None:
        ways = [f"--weights {quantization.activations}", f"--precision {other}"]
    if quantization.activations is not None and quantization.calibration is None:
        ways.append("--calibration PIPELINE --prompts FILE")
    return f"Without 8 bits it differs by {without.maximum:.2g}: use {', '.join(ways)}, or no 8 bits"


def validate(
    graph: Path | str,
    model: Path | str,
    options: SourceOptions | None = None,
    progress: Progress | None = None,
) -> ValidationReport:
    """Run `graph` beside the eager reference on the weights of `model`.

    Args:
        graph: An ONNX file that sws-export wrote; the options of its export are read from it.
        model: The checkpoint.
        options: How to read the checkpoint; its precision and inputs are those of the graph.
        progress: Receives the stages.

    Raises:
        CheckpointError: The checkpoint is missing, or the graph was not written by sws-export.
        ManifestError: The graph cannot be read.
        ValidationError: The graph was exported from another checkpoint.
    """
    graph, model = Path(graph), Path(model)
    options, progress = options or SourceOptions(), progress or SilentProgress()
    if model.suffix == ".onnx":
        raise CheckpointError(f"{model} is a graph: expected the checkpoint that {graph} was exported from")
    manifest = _manifest(graph)
    residuals = any(spec["name"] == MID_RESIDUAL for spec in manifest["inputs"])
    as_exported = dataclasses.replace(options, precision=manifest["precision"], controlnet=residuals)
    source = open_source(model, ExportOptions(source=as_exported), progress)
    source.check(progress)
    found = source.read_weights(progress)
    if found != manifest["source"]["sha256"]:
        raise ValidationError(
            f"{graph} was exported from {manifest['source']['file']} with sha256 "
            f"{manifest['source']['sha256'][:12]}…, {model} has {found[:12]}…; "
            "give the checkpoint that it was exported from"
        )
    return source.validate(graph, SwsSpec.from_manifest(manifest), progress)


def _manifest(graph: Path) -> Manifest:
    manifest = read_embedded(graph)
    if manifest is None:
        raise CheckpointError(f"{graph} was not written by sws-export: it has no embedded manifest")
    return manifest

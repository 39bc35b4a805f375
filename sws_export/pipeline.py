"""The road: checkpoint or plain ONNX in; SWS graph, validation, engine and manifest out."""

import dataclasses
from pathlib import Path
from typing import Any

from sws_export import manifest as manifests
from sws_export.artefact import output_errors, publish_together, staged_directory
from sws_export.engine_plan import choose_target, plan_engine, plan_graph_sizes
from sws_export.engines import EngineReport, build_engine
from sws_export.errors import OutputError
from sws_export.graph_making import GraphMaking
from sws_export.onnx_files import data_file
from sws_export.options import ExportOptions, artefact_kind, guard_options
from sws_export.preflight import Preflight, preflight
from sws_export.profile import shapes_for
from sws_export.progress import Progress, Silent
from sws_export.rewrite import graph_specs
from sws_export.sources import open_source
from sws_export.stages import StageFigures, StageLog
from sws_export.validation import ValidationReport


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What an export made.

    Attributes:
        files: Artefacts written, the one asked for first; empty after a dry run.
        manifest: What was written to `<out>.json`; empty after a dry run.
        preflight: What was expected to be needed.
        validation: None where it was skipped.
        engine: None for an ONNX graph.
        stages: Wall time and peak memory.
    """

    files: tuple[Path, ...]
    manifest: dict[str, Any]
    preflight: Preflight
    validation: ValidationReport | None
    engine: EngineReport | None
    stages: tuple[StageFigures, ...]


def export(
    model: Path | str,
    out: Path | str,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Turn a Stable-Diffusion-family UNet into an SWS graph or engine.

    Args:
        model: A diffusers directory, a .safetensors file, or a plain .onnx graph.
        out: `.onnx` for the graph, `.plan` or `.engine` for an engine.
        options: What to do; the defaults of the command line where None.
        progress: Hears of stages, remarks and warnings; silent where None.

    Returns:
        What was written and measured.

    Raises:
        SwsExportError: Something about the model, the options or the machine; nothing is left behind.
    """
    model, out = Path(model), Path(out)
    options, progress = options or ExportOptions(), progress or Silent()
    kind = artefact_kind(out)
    guard_options(options)
    _check_destination(model, out, keep_onnx=options.keep_onnx or kind == "onnx")
    log = StageLog()
    source = open_source(model, options, progress)
    for line in source.describe():
        progress.log(line)
    engine_plan = plan_engine(source, options, progress) if kind == "engine" else None
    sizes = engine_plan.sizes.fixed() if engine_plan else plan_graph_sizes(source, options)
    needs = preflight(source, engine_plan.build.backend if engine_plan else None, options, out)
    for line in needs.describe():
        progress.log(line)
    for shortage in needs.shortages():
        progress.warn(shortage)
    if options.dry_run:
        return ExportReport((), {}, needs, None, None, ())

    with staged_directory(out) as scratch:
        with log.measure("check"):
            description = source.verify(progress)
        graph_path = scratch / (out.name if kind == "onnx" else out.with_suffix(".onnx").name)
        making = GraphMaking(
            source, description, options, choose_target(options, engine_plan), sizes, log, progress
        )
        graph, validation = making.make(graph_path)
        engine, profile = None, None
        if engine_plan is not None:
            shapes = shapes_for(graph_specs(graph.graph.inputs), engine_plan.sizes)
            profile = manifests.describe_profile(shapes)
            with log.measure("build") as figures, output_errors(out):
                engine = build_engine(graph_path, scratch / out.name, shapes, engine_plan.build, progress)
                figures.peak_memory = engine.peak_memory
        staged = _artefacts(scratch, graph_path, out, keep_onnx=options.keep_onnx)
        with log.measure("hash"), progress.stage("hash"):
            document = manifests.complete(
                manifests.embedded(graph) or {}, out, staged, validation, engine, profile, log.stages
            )
        files = _publish(staged, scratch, out, document)
    return ExportReport(files, document, needs, validation, engine, tuple(log.stages))


def _check_destination(model: Path, out: Path, *, keep_onnx: bool) -> None:
    """Refuse a destination that cannot be written before any long work is done."""
    graph = out.with_suffix(".onnx")
    files = {out, manifests.manifest_path(out)} | ({graph, data_file(graph)} if keep_onnx else set())
    for file in sorted(files):
        if file.is_dir():
            raise OutputError(f"cannot write {file}: it is a directory; choose another --out")
        if file.exists() and model.exists() and file.samefile(model):
            raise OutputError(f"cannot write {file}: that would overwrite the model; choose another --out")
    with staged_directory(out):
        pass


def _artefacts(scratch: Path, graph_path: Path, out: Path, *, keep_onnx: bool) -> list[Path]:
    """The staged files that are to be kept, in the order in which they may appear."""
    staged = [scratch / out.name]
    if keep_onnx and graph_path.name != out.name:
        staged.insert(0, graph_path)
    # Weights first: an ONNX file must never lie there without them.
    weights = [data_file(file) for file in staged if data_file(file).exists()]
    return [*weights, *staged]


def _publish(staged: list[Path], scratch: Path, out: Path, document: dict[str, Any]) -> tuple[Path, ...]:
    """Move the artefacts to their places, the manifest last; returns them, the one asked for first."""
    manifest = scratch / manifests.manifest_path(out).name
    manifests.write_manifest(document, manifest)
    places = {file: out.parent / file.name for file in (*staged, manifest)}
    publish_together(places)
    return tuple(sorted(places.values(), key=lambda file: file.name != out.name))

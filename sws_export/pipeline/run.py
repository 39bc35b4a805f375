"""The export pipeline: a checkpoint or plain ONNX graph in; an SWS graph, its validation, an engine out."""

import contextlib
import dataclasses
import functools
from pathlib import Path

from sws_export.cache import open_cache
from sws_export.calibration import check_pipeline
from sws_export.engines.build import EngineReport
from sws_export.engines.gpu_memory import describe_gpu_memory
from sws_export.errors import OutputError
from sws_export.files import external_data_path, output_errors, publish_together, staged_directory
from sws_export.manifest import Manifest, manifest_path, write_manifest
from sws_export.options import ExportOptions, QuantizationOptions, artefact_kind
from sws_export.pipeline.cached import StageCache
from sws_export.pipeline.describe import complete
from sws_export.pipeline.engine import BuiltEngine, check_gpu_memory, make_engine, profile_shapes
from sws_export.pipeline.graph import Graph, GraphExporter
from sws_export.pipeline.input_files import InputFiles
from sws_export.pipeline.plan import ExportPlan, make_plan
from sws_export.pipeline.preflight import Preflight, preflight
from sws_export.pipeline.run_log import RunLog
from sws_export.pipeline.validate import validate_graph
from sws_export.progress import Progress, SilentProgress
from sws_export.sources import open_source
from sws_export.stage_timings import StageTiming, rare_garbage_collection
from sws_export.validation import ValidationReport


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """The result of an export.

    Attributes:
        files: Artefacts written, the requested one first; empty after a dry run.
        manifest: What was written to `<out>.json`; None after a dry run.
        precision: Precision of the UNet, and why it has it.
        preflight: The expected needs.
        validation: None if it was skipped.
        engine: None for an ONNX graph.
        stages: Wall time and peak memory of each stage.
    """

    files: tuple[Path, ...]
    manifest: Manifest | None
    precision: str
    preflight: Preflight
    validation: ValidationReport | None
    engine: EngineReport | None
    stages: tuple[StageTiming, ...]

    def gpu_memory(self) -> list[str]:
        """The GPU memory that the engine needs, a line for each profile; empty for a graph."""
        if self.engine is None:
            return []
        return describe_gpu_memory(self.engine.gpu_memory, self.preflight.profiles)


@rare_garbage_collection()
def export(
    model: Path | str,
    out: Path | str,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Export a Stable-Diffusion-family UNet as an SWS graph or engine.

    Args:
        model: A diffusers directory, a .safetensors file, a plain .onnx graph, or a repository of the Hugging
            Face Hub as NAME or NAME@REVISION.
        out: `.onnx` for the graph, `.plan` or `.engine` for an engine.
        options: Defaults of the command line if None.
        progress: Receives stages, remarks and warnings; silent if None.

    Returns:
        What was written and measured.

    Raises:
        SwsExportError: The model, the options or the machine do not allow the export; no file is left behind.
    """
    model, out, options = Path(model), Path(out), options or ExportOptions()
    log = RunLog(progress or SilentProgress())

    # 1. Open: read headers, reject what cannot be exported or written.
    _check_destination(model, out, options)
    inputs = InputFiles()
    if model.is_file():
        inputs.record([model])
    source = open_source(model, options, log, engine=artefact_kind(out) == "engine")
    for line in source.describe():
        log.log(line)

    # 2. Plan: choose backend, target and sizes; compare the expected needs with the machine.
    plan = make_plan(source, options, out, log)
    inputs.record(source.files_read)
    cache = StageCache(plan, open_cache(enabled=options.cache), inputs, log)
    known = cache.known()
    if "graph" not in known:
        _check_calibration(options.quantization)
    needs = preflight(source, plan.engine, options, out, known)
    for line in needs.describe():
        log.log(line)
    for shortage in needs.shortages():
        log.warn(shortage)
    precision = f"{source.precision}, {source.precision_reason}"
    if options.dry_run:
        return ExportReport((), None, precision, needs, None, None, ())

    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(staged_directory(out))
        path = scratch / out.with_suffix(".onnx").name
        # Weights are read, checked and copied in a thread from here on.
        cache.check.copy_path = external_data_path(path)
        stack.enter_context(cache.check)
        validation, engine = None, None

        # 3. Graph: trace the UNet, insert SWS, lower it for the target, all when a step needs the file.
        exporter = GraphExporter(plan, cache.check, functools.partial(cache.plain_model, scratch), log)
        dynamic, graph = exporter.graphs(path)

        # 4. Validate: compare with the reference, with dynamic shapes on a small grid.
        if options.validate:
            validation = cache.validation(
                dynamic, lambda: validate_graph(plan, dynamic, log, exporter.unquantized())
            )
        graph = cache.graph(graph)
        if validation is not None and graph.remark:
            validation = dataclasses.replace(validation, remarks=(*validation.remarks, graph.remark))

        # 5. Build the engine.
        if (config := plan.engine) is not None:
            plan_path = scratch / out.name
            engine = cache.engine(
                graph, config, plan_path, lambda: make_engine(graph, config, plan_path, log)
            )
            check_gpu_memory(engine.report, config)

        # 6. Publish: the complete files move to their place together, the manifest last.
        document, files = _publish(plan, graph, validation, engine, inputs, scratch, log)
    report = engine.report if engine else None
    return ExportReport(files, document, precision, needs, validation, report, tuple(log.timings))


def _check_destination(model: Path, out: Path, options: ExportOptions) -> None:
    """Reject a destination that cannot be written before any long work is done."""
    keeps_graph = artefact_kind(out) == "onnx" or options.keep_onnx
    graph = out.with_suffix(".onnx")
    files = {out, manifest_path(out)}
    if keeps_graph:
        files |= {graph, external_data_path(graph), manifest_path(graph)}
    for file in sorted(files):
        with output_errors(file):
            exists = file.exists()
        if exists and not file.is_file():
            what = "a directory" if file.is_dir() else "a FIFO, device or socket"
            raise OutputError(f"cannot write {file}: it is {what}; choose another --out")
        if exists and model.exists() and file.samefile(model):
            raise OutputError(f"cannot write {file}: that would overwrite the model; choose another --out")
    with staged_directory(out):
        pass


def _check_calibration(options: QuantizationOptions) -> None:
    """Reject a pipeline or prompts that cannot be used before any long work is done."""
    if options.calibration is not None:
        options.read_prompts()
        check_pipeline(options.calibration, trust_code=options.trust_code)


def _publish(
    plan: ExportPlan,
    graph: Graph,
    validation: ValidationReport | None,
    engine: BuiltEngine | None,
    inputs: InputFiles,
    scratch: Path,
    log: RunLog,
) -> tuple[Manifest, tuple[Path, ...]]:
    """Write the manifest and move the artefacts to their places; returns it and them, the requested first."""
    # The weights come first: an ONNX file must never be there without them.
    staged = [external_data_path(graph.path), graph.path] if plan.keeps_graph else []
    digests = {file: graph.write().files[file] for file in staged if file in graph.write().files}
    describe = functools.partial(complete, graph.description)
    manifests = {}
    if engine is None or plan.engine is None:
        document = describe(plan.out, digests, validation, None, None, log.timings)
    else:
        if plan.keeps_graph:
            # Each artefact is loaded with a manifest of its own.
            manifests[graph.path] = describe(graph.path, digests, validation, None, None, log.timings)
        digests[engine.path] = engine.digest
        profiles = profile_shapes(graph.description, plan.engine)
        document = describe(plan.out, digests, validation, engine.report, profiles, log.timings)
    manifests[plan.out] = document
    written = [scratch / manifest_path(artefact).name for artefact in manifests]
    for file, content in zip(written, manifests.values(), strict=True):
        write_manifest(content, file)
    places = {file: plan.out.parent / file.name for file in (*digests, *written)}
    # A large graph that this one replaces had its weights in a file beside it.
    graphs = [place for place in places.values() if place.suffix == ".onnx" and place.exists()]
    obsolete = [
        external_data_path(place) for place in graphs if external_data_path(place) not in places.values()
    ]
    inputs.require_unchanged()
    publish_together(places, obsolete)
    return document, tuple(sorted(places.values(), key=lambda file: file.name != plan.out.name))

"""The road: checkpoint or plain ONNX in; SWS graph, validation, engine and manifest out."""

import dataclasses
from pathlib import Path
from typing import Any

from sws_export import manifest as manifests
from sws_export.cache import Cache, FileDigest, open_cache
from sws_export.cache.store import file_digest
from sws_export.engines import EngineReport, build_engine
from sws_export.engines.build import tell_warnings
from sws_export.errors import OutputError
from sws_export.files import output_errors, publish_together, staged_directory
from sws_export.onnx_files import data_file
from sws_export.options.options import ExportOptions, artefact_kind, guard_options
from sws_export.pipeline.cached_engine import engine_key, store_engine, take_engine
from sws_export.pipeline.cached_graph import GraphRecord, StaleEntryError
from sws_export.pipeline.engine_config import (
    EngineConfig,
    choose_target,
    configure_engine,
    static_graph_sizes,
)
from sws_export.pipeline.graph_results import known_graph, obtain_graph
from sws_export.pipeline.job import Job
from sws_export.pipeline.preflight import Preflight, preflight
from sws_export.progress import Progress, Silent
from sws_export.sources.source import open_source
from sws_export.stage_timings import StageLog, StageTiming
from sws_export.tensors import Shapes, TensorSpec, shapes_for
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
    stages: tuple[StageTiming, ...]


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
    cache = open_cache(enabled=options.cache)
    source = open_source(model, options, progress)
    for line in source.describe():
        progress.log(line)
    engine_config = configure_engine(source, options, progress) if kind == "engine" else None
    job = Job(
        source=source,
        options=options,
        out=out,
        engine=engine_config,
        target=choose_target(options, engine_config),
        sizes=engine_config.sizes.fixed() if engine_config else static_graph_sizes(source, options),
        cache=cache,
        progress=progress,
    )
    needs = preflight(source, engine_config, options, out, _known(job))
    for line in needs.describe():
        progress.log(line)
    for shortage in needs.shortages():
        progress.warn(shortage)
    if options.dry_run:
        return ExportReport((), {}, needs, None, None, ())

    while True:
        try:
            return _make(job, needs)
        except StaleEntryError as error:
            # The entry is gone by now, so that this ends.
            progress.warn(f"{error}: making it anew")


def _known(job: Job) -> tuple[str, ...]:
    """What is in the cache, as far as it can be told without reading the checkpoint."""
    graph = known_graph(job)
    if graph is None:
        return ()
    return ("graph", "engine") if _knows_engine(job, graph) else ("graph",)


def _make(job: Job, needs: Preflight) -> ExportReport:
    """Make or find everything, beside its destination, and move it there."""
    out, log = job.out, StageLog()
    with staged_directory(out) as scratch:
        graph_path = scratch / (out.name if job.engine is None else out.with_suffix(".onnx").name)
        graph = obtain_graph(
            job, graph_path, log, lambda known: job.keeps_graph or not _knows_engine(job, known)
        )
        staged = _graph_files(graph_path) if job.keeps_graph else []
        engine, profile, digests = None, None, {}
        if job.engine is not None:
            profile = manifests.describe_profile(_shapes(graph, job.engine))
            engine, facts = _obtain_engine(job, job.engine, graph, graph_path, scratch / out.name, log)
            digests[scratch / out.name] = facts
            staged.append(scratch / out.name)
        with log.measure("hash"), job.progress.stage("hash"):
            digests = {file: digests.get(file) or file_digest(file) for file in staged}
        document = manifests.complete(
            graph.description, out, digests, graph.validation, engine, profile, log.stages
        )
        files = _publish(staged, scratch, out, document)
    return ExportReport(files, document, needs, graph.validation, engine, tuple(log.stages))


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


def _shapes(graph: GraphRecord, plan: EngineConfig) -> Shapes:
    inputs = [
        TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"])) for spec in graph.description["inputs"]
    ]
    return shapes_for(tuple(inputs), plan.sizes)


def _knows_engine(job: Job, graph: GraphRecord) -> bool:
    """Whether the engine is in the cache."""
    if job.engine is None or job.engine.build.timing_cache is not None:
        return False
    key = engine_key(graph.content, _shapes(graph, job.engine), job.engine.build)
    return job.cache.find("engine", key) is not None


def _obtain_engine(
    job: Job, plan: EngineConfig, graph: GraphRecord, graph_path: Path, place: Path, log: StageLog
) -> tuple[EngineReport, FileDigest]:
    """Find the engine in the cache, or build it from the graph; its plan goes to `place`."""
    shapes = _shapes(graph, plan)
    key = engine_key(graph.content, shapes, plan.build)
    # Kernel timings are an outcome of the build too, which the cache does not hold.
    cache = job.cache if plan.build.timing_cache is None else Cache(None, 0)
    with cache.exclusive("engine", key, job.progress), output_errors(job.out):
        entry = cache.find("engine", key)
        if entry is not None:
            report, figures, facts = take_engine(cache, entry, place, job.out, job.progress)
            job.progress.log(f"engine: from the cache ({key[:12]})")
            tell_warnings(report, job.progress)
            log.recall(figures)
            return report, facts
        if not graph_path.exists():
            raise StaleEntryError(f"the engine {key[:12]} was removed from the cache")
        with log.measure("build") as figures:
            report = build_engine(graph_path, place, shapes, plan.build, job.progress)
            figures.peak_memory = report.peak_memory
        with job.progress.stage("hash"):
            facts = file_digest(place)
        sizes = " ".join(f"{name} {size}" for name, size in plan.sizes.ranges().items())
        what = f"{job.what}, {sizes}"
        store_engine(cache, key, place, facts, report, figures, what, job.progress)
    return report, facts


def _graph_files(path: Path) -> list[Path]:
    """A staged graph with its weights, which come first: an ONNX file must never lie there without them."""
    return [file for file in (data_file(path), path) if file.exists()]


def _publish(staged: list[Path], scratch: Path, out: Path, document: dict[str, Any]) -> tuple[Path, ...]:
    """Move the artefacts to their places, the manifest last; returns them, the one asked for first."""
    manifest = scratch / manifests.manifest_path(out).name
    manifests.write_manifest(document, manifest)
    places = {file: out.parent / file.name for file in (*staged, manifest)}
    # A large graph that this one replaces had its weights in a file beside it.
    graphs = [place for place in places.values() if place.suffix == ".onnx" and place.exists()]
    obsolete = [data_file(place) for place in graphs if data_file(place) not in places.values()]
    publish_together(places, obsolete)
    return tuple(sorted(places.values(), key=lambda file: file.name != out.name))

"""The cache around the stages of an export: each result is looked up before its stage runs, and kept after.

Weights are not kept. They are in the checkpoint, whose sha256 is part of the key of a graph. A graph that is
needed again is written from the checkpoint and the cached graph without weights, and the files of the
checkpoint must have that sha256. A trace, the plain graph without weights, serves all checkpoints of its
architecture.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import onnx_ir as ir

from sws_export.cache import Cache, Entry, cache_key, code_version
from sws_export.cache.store import Kind
from sws_export.documents import Sha256, check_document
from sws_export.engines.build import EngineReport
from sws_export.engines.gpu import gpu_names
from sws_export.files import FileDigest, file_digest, output_errors
from sws_export.manifest import GraphDescription
from sws_export.onnx_files import save_onnx
from sws_export.pipeline.cached_check import CachedCheck
from sws_export.pipeline.describe import library_versions
from sws_export.pipeline.engine import BuiltEngine, profile_shapes
from sws_export.pipeline.graph import Graph, WrittenGraph
from sws_export.pipeline.input_files import InputFiles
from sws_export.pipeline.plan import EngineConfig, ExportPlan
from sws_export.pipeline.run_log import Recorded, RunLog
from sws_export.pipeline.skeleton import SKELETON, complete_skeleton, save_skeleton
from sws_export.progress import SilentProgress
from sws_export.sources import Source
from sws_export.tensors import ProfileShapes
from sws_export.validation import OutputDifference, ValidationReport


class _Metadata(TypedDict):
    """Metadata of every cached result: its label, and what the check and the making of it logged."""

    label: str
    check: Recorded
    making: Recorded


class _TraceMetadata(TypedDict):
    """Metadata of a trace: its label, and name and shape of each weight that the architecture needs."""

    label: str
    shapes: list[tuple[str, list[int]]]


class _GraphMetadata(_Metadata):
    description: GraphDescription
    remark: str
    content: Sha256


class _ValidationMetadata(_Metadata):
    report: ValidationReport


class _EngineMetadata(_Metadata):
    engine: EngineReport


_SCHEMAS: Mapping[Kind, tuple[Any, int]] = {
    "trace": (_TraceMetadata, 1),
    "graph": (_GraphMetadata, 1),
    "validation": (_ValidationMetadata, 0),
    "engine": (_EngineMetadata, 1),
}
"""Schema of the metadata, and number of files, of each kind of result."""


class StageCache:
    """The stages of one export, each of them with a look into the cache before it.

    Attributes:
        check: The check of the source.
    """

    def __init__(self, plan: ExportPlan, cache: Cache, inputs: InputFiles, log: RunLog) -> None:
        self._plan = plan
        self._cache = cache
        self._inputs = inputs
        self._log = log
        self._content = ""
        """sha256, in hex, of the engine's graph without its weights and of the identity of their source."""
        self.check = CachedCheck(plan.source, cache, log, plan.whole_files)
        self._trace_key = _trace_key(plan.source) if self._is_enabled else ""
        trace = self._get("trace", self._trace_key) if self._trace_key else None
        if trace is not None:
            self.check.shapes = {name: tuple(shape) for name, shape in trace.metadata["shapes"]}

    def known(self) -> tuple[str, ...]:
        """Those of the results `graph` and `engine` that are found without reading the checkpoint."""
        if not self.check.has_stored_digest:
            return ()
        entry = self._get("graph", self._key("graph"))
        if entry is None:
            return ()
        if self._plan.options.validate and self._get("validation", self._key("validation")) is None:
            return ()
        config = self._plan.engine
        if config is None or config.build.timing_cache is not None:
            return ("graph",)
        key = _engine_key(
            entry.metadata["content"], profile_shapes(entry.metadata["description"], config), config
        )
        return ("graph", "engine") if self._get("engine", key) else ("graph",)

    def plain_model(self, scratch: Path) -> ir.Model:
        """The plain graph of the source, from the cache if its architecture was traced before.

        Args:
            scratch: A directory for temporary files.
        """
        source = self._plan.source
        if not self._trace_key:
            return source.plain_model(self._log)
        with self._cache.lock("trace", self._trace_key, self._log):
            model = self._restore_trace(scratch)
            if model is None:
                model = source.plain_model(self._log)
                self._keep_trace(model, scratch)
            return model

    def validation(self, graph: Graph, validate: Callable[[], ValidationReport]) -> ValidationReport:
        """The result of `validate`, or that of an earlier run for the same `graph`."""
        with self._found("validation") as entry:
            if entry is not None:
                self._log.log(f"validation: from the cache ({entry.key[:12]})")
                self._replay(entry)
                return _read_validation(entry.metadata["report"])
            # Messages about the graph are recorded by the graph itself, outside of the block below.
            self.check.start()
            graph.write()
            with self._log.record() as making:
                validation = validate()
            if self._is_enabled:
                metadata = {
                    "label": self._plan.summary,
                    "report": dataclasses.asdict(validation),
                    **self._recorded(making),
                }
                self._put("validation", self._key("validation"), metadata, {})
            return validation

    def graph(self, graph: Graph) -> Graph:
        """`graph`, or the same one from the cache, which is not written until its file is needed."""
        with self._found("graph") as entry:
            if entry is not None and not graph.is_written:
                self._log.log(f"graph: from the cache ({entry.key[:12]})")
                self._replay(entry)
                self._content = entry.metadata["content"]
                return _CachedGraph(entry, graph, self, self._log)
            self.check.start()
            graph.write()
            if self._is_enabled:
                self.keep_graph(graph)
            return graph

    def engine(
        self, graph: Graph, config: EngineConfig, path: Path, build: Callable[[], BuiltEngine]
    ) -> BuiltEngine:
        """The result of `build`, or the engine of an earlier run, whose plan is put at `path`."""
        # Kernel timings are a result of the build too, which the cache does not keep.
        if not self._is_enabled or config.build.timing_cache is not None:
            return build()
        key = self._engine_key(graph, config)
        with self._cache.lock("engine", key, self._log), output_errors(self._plan.out):
            entry = self._get("engine", key)
            if entry is not None and (engine := self._restore_engine(entry, path)) is not None:
                return engine
            graph.write()
            with self._log.record() as making:
                engine = build()
            metadata = {
                "label": f"{self._plan.summary}, {'; '.join(map(str, config.profiles))}",
                "engine": dataclasses.asdict(engine.report),
                **self._recorded(making),
            }
            # A graph from the cache that could not be written was made again, perhaps with other weights.
            key = self._engine_key(graph, config)
            self._put("engine", key, metadata, {path: engine.digest})
            return engine

    def keep_graph(self, graph: Graph) -> None:
        """Keep a graph without its weights."""
        skeleton = save_skeleton(graph.write().model, self._plan.source.weights(), graph.path.parent)
        digest = file_digest(skeleton)
        identity = self._plan.source.identity(self.check.sha256)
        self._content = cache_key({"graph": digest.sha256, "source": identity})
        metadata = {
            "label": self._plan.summary,
            "description": graph.description,
            "remark": graph.remark,
            "content": self._content,
            **self._recorded(graph.recorded),
        }
        self._put("graph", self._key("graph"), metadata, {skeleton: digest})

    def restore_graph(self, entry: Entry, path: Path) -> WrittenGraph | None:
        """Write a graph from the cache to `path`; None if it is damaged or was removed, with a warning.

        Raises:
            CheckpointError: The source does not have its stored digest.
        """
        model = self._complete(entry, path.parent)
        if model is None:
            return None
        with self._log.measure("restore"):
            self.check.start()
            files = save_onnx(model, path, self._log, whole=self.check.whole_files)
            self.check.require_stored_digest()
        return WrittenGraph(path, model, files, entry.metadata["remark"])

    @property
    def _is_enabled(self) -> bool:
        return self._cache.root is not None

    @contextlib.contextmanager
    def _found(self, kind: Literal["graph", "validation"]) -> Iterator[Entry | None]:
        """The cached graph or validation, which no other process makes meanwhile; None if there is none."""
        if not self._is_enabled:
            yield None
            return
        key = self._key(kind)
        with self._cache.lock(kind, key, self._log):
            yield self._get(kind, key)

    def _get(self, kind: Kind, key: str) -> Entry | None:
        """The cached result of `key`; one with malformed metadata is removed."""
        entry = self._cache.get(kind, key)
        if entry is None:
            return None
        schema, files = _SCHEMAS[kind]
        try:
            check_document(entry.metadata, schema)
        except ValueError:
            self._cache.evict(entry)
            return None
        return entry if len(entry.files) == files else None

    def _put(
        self, kind: Kind, key: str, metadata: Mapping[str, Any], files: Mapping[Path, FileDigest]
    ) -> None:
        """Store a result, unless an input was changed while it was made.

        Raises:
            CheckpointError: A file was changed.
        """
        self._inputs.require_unchanged()
        self._cache.put(kind, key, metadata, files, self._log)

    def _key(self, kind: Literal["graph", "validation"]) -> str:
        """What a graph and its validation depend on. Static shapes are those of the graph only."""
        plan = self._plan
        return cache_key(
            {
                "source": plan.source.identity(self.check.sha256),
                "precision": plan.source.precision,
                "options": plan.options.source.cache_key()
                | plan.options.sws.cache_key()
                | plan.options.quantization.cache_key(),
                "validated": plan.options.validate,
                "target": plan.target.name,
                "sizes": dict(plan.static_sizes) if kind == "graph" else {},
                "largest": dict(plan.largest_sizes),
                "versions": library_versions(("onnxruntime", "numpy", "polygraphy")),
                "code": code_version(),
            }
        )

    def _recorded(self, making: Recorded) -> dict[str, Any]:
        """What the check and the making of a result logged, as metadata of its entry."""
        check = self.check.recorded or Recorded()
        return {"check": check.to_json(), "making": making.to_json()}

    def _replay(self, entry: Entry) -> None:
        """Log what the making of a result logged; the check only once in a run."""
        if self.check.recorded is None:
            self.check.recorded = Recorded.from_json(entry.metadata["check"])
            self._log.replay(self.check.recorded)
        self._log.replay(Recorded.from_json(entry.metadata["making"]))

    def _restore_trace(self, scratch: Path) -> ir.Model | None:
        """The plain graph from the cache; None if it is not there or damaged."""
        entry = self._get("trace", self._trace_key)
        if entry is None:
            return None
        # What is logged here belongs to this run, not to the graph that is made from the trace.
        with self._log.record(apart=True):
            model = self._complete(entry, scratch)
            if model is not None:
                self._log.log(f"trace: from the cache ({entry.key[:12]})")
        return model

    def _keep_trace(self, model: ir.Model, scratch: Path) -> None:
        """Keep a plain graph without its weights, and their shapes."""
        source = self._plan.source
        # Names that are known to fit, from a cached result, were not compared again.
        shapes = self.check.shapes or source.check(SilentProgress()) or {}
        skeleton = save_skeleton(model, source.weights(), scratch)
        metadata = {"label": f"{source.name}, {source.precision}", "shapes": list(shapes.items())}
        self._put("trace", self._trace_key, metadata, {skeleton: file_digest(skeleton)})
        # A hard link to it may be in the cache, which the next skeleton must not overwrite.
        skeleton.unlink()

    def _complete(self, entry: Entry, scratch: Path) -> ir.Model | None:
        """The graph of `entry` with the weights of the source; None if it is damaged or was removed."""
        skeleton = scratch / f"skeleton-{SKELETON}"
        if not self._cache.extract(entry, SKELETON, skeleton):
            self._warn_of_damage(entry)
            return None
        model = complete_skeleton(skeleton, self._plan.source.weights())
        skeleton.unlink()
        if model is None:
            self._cache.evict(entry)
            self._warn_of_damage(entry)
        return model

    def _warn_of_damage(self, entry: Entry) -> None:
        self._log.warn(
            f"the {entry.kind} {entry.key[:12]} in the cache is damaged or was removed: making it again"
        )

    def _engine_key(self, graph: Graph, config: EngineConfig) -> str:
        return _engine_key(self._content, profile_shapes(graph.description, config), config)

    def _restore_engine(self, entry: Entry, path: Path) -> BuiltEngine | None:
        """The engine of `entry`, its plan put at `path`; None if it is damaged or was removed."""
        (name,) = entry.files
        with self._log.stage("read cache") as stage:
            stage.describe(f"engine {entry.key[:12]}")
            if not self._cache.extract(entry, name, path, replaces=self._plan.out):
                self._warn_of_damage(entry)
                return None
        self._log.log(f"engine: from the cache ({entry.key[:12]})")
        self._replay(entry)
        return BuiltEngine(path, EngineReport.from_json(entry.metadata["engine"]), entry.files[name])


class _CachedGraph(Graph):
    """A graph that was found; its file is written from the cache, or made if that fails."""

    def __init__(self, entry: Entry, made: Graph, cache: StageCache, log: RunLog) -> None:
        super().__init__(made.path, log, self._restore)
        self._entry = entry
        self._made = made
        self._cache = cache

    def _restore(self, path: Path) -> WrittenGraph:
        written = self._cache.restore_graph(self._entry, path)
        if written is not None:
            return written
        recorded = Recorded.from_json(self._entry.metadata["making"])
        self._log.discard({timing.name for timing in recorded.timings})
        written = self._made.write()
        self._cache.keep_graph(self._made)
        return written

    @property
    def description(self) -> GraphDescription:
        """The manifest embedded in the graph."""
        if self.is_written:
            return super().description
        description: GraphDescription = self._entry.metadata["description"]
        return description

    @property
    def remark(self) -> str:
        """How a static graph was compared with the dynamic one."""
        return super().remark if self.is_written else str(self._entry.metadata["remark"])


def _trace_key(source: Source) -> str:
    """What the plain graph of a checkpoint depends on besides its weights; empty for a graph."""
    identity = source.trace_identity()
    if identity is None:
        return ""
    return cache_key(identity | {"versions": library_versions(), "code": code_version()})


def _engine_key(content: str, profiles: Sequence[ProfileShapes], config: EngineConfig) -> str:
    """What an engine depends on: graph, profiles, options, library, and the GPU if it is built for one."""
    build = config.build
    return cache_key(
        {
            "graph": content,
            "profiles": list(profiles),
            "options": build.cache_key(),
            "library": str(build.backend.load().__version__),
            "gpus": gpu_names() if build.backend.needs_gpu else [],
            "code": code_version(),
        }
    )


def _read_validation(report: Mapping[str, Any]) -> ValidationReport:
    outputs = tuple(OutputDifference(**output) for output in report["outputs"])
    unquantized = OutputDifference(**report["unquantized"]) if report["unquantized"] else None
    changed = {"outputs": outputs, "remarks": tuple(report["remarks"]), "unquantized": unquantized}
    return ValidationReport(**dict(report) | changed)

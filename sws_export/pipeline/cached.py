"""The cache around the stages of an export: each result is looked up before its stage runs, and kept after.

Weights are not kept. They are in the checkpoint, whose sha256 is part of the key of a graph. A graph that is
needed again is written from the checkpoint and the cached graph without weights, and its weights must have
the digest that they had when the graph was made.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict

import onnx_ir as ir

from graph_passes.quantize_weights import restored_tensor
from sws_export.cache import Cache, Entry, cache_key, code_version
from sws_export.cache.digests import Stamps, file_stamps
from sws_export.cache.store import Kind
from sws_export.documents import Sha256, check_document
from sws_export.engines.build import EngineReport
from sws_export.engines.gpu import gpu_names
from sws_export.errors import CheckpointError
from sws_export.files import FileDigest, file_digest, output_errors
from sws_export.manifest import GraphDescription
from sws_export.onnx_files import load_onnx, save_onnx
from sws_export.pipeline.describe import library_versions
from sws_export.pipeline.engine import Engine, profile_shapes
from sws_export.pipeline.graph import Graph, WrittenGraph
from sws_export.pipeline.input_files import InputFiles
from sws_export.pipeline.plan import EngineConfig, ExportPlan
from sws_export.pipeline.run_log import Recorded, RunLog
from sws_export.pipeline.source_check import SourceCheck
from sws_export.progress import Progress
from sws_export.sources import Source
from sws_export.tensors import ProfileShapes
from sws_export.validation import OutputDifference, ValidationReport

_FILE = "graph.onnx"
_PLACEHOLDER = "weights-of-the-source"


class _Metadata(TypedDict):
    """Metadata of every cached result: its label, and what the check and the making of it logged."""

    label: str
    check: Recorded
    making: Recorded


class _GraphMetadata(_Metadata):
    description: GraphDescription
    remark: str
    content: Sha256
    weights: Sha256


class _ValidationMetadata(_Metadata):
    report: ValidationReport


class _EngineMetadata(_Metadata):
    engine: EngineReport


_SCHEMAS: Mapping[Kind, tuple[Any, int]] = {
    "graph": (_GraphMetadata, 1),
    "validation": (_ValidationMetadata, 0),
    "engine": (_EngineMetadata, 1),
}
"""Schema of the metadata, and number of files, of each kind of result."""


class CachedCheck(SourceCheck):
    """A check that is not done while the remembered digest of unchanged files is all that is needed."""

    def __init__(self, source: Source, cache: Cache, log: RunLog) -> None:
        super().__init__(source, log)
        self._digests = cache.digests
        self._remembered = cache.digests.get(source.files)
        self._before: tuple[Stamps, float] | None = None

    def __enter__(self) -> Self:
        """Start to read the weights, unless their digest is remembered."""
        return self if self.is_remembered else super().__enter__()

    def start(self) -> None:
        """Start to read the weights in a thread, unless that was done."""
        if self._before is None:
            self._before = file_stamps(self._source.files)
        super().start()

    @property
    def sha256(self) -> str:
        """Digest of the source's files, in hex."""
        return self._remembered or super().sha256

    @property
    def is_remembered(self) -> bool:
        """Whether the digest is known without reading the files."""
        return self._remembered is not None

    def forget(self) -> None:
        """Read the files again, because the remembered digest is not theirs."""
        self._remembered = None
        self._digests.evict(self._source.files)

    def _wait(self) -> str:
        assert self._before is not None
        sha256 = super()._wait()
        if self._remembered not in (None, sha256):
            self.forget()
            raise CheckpointError(_changed_unnoticed(self._source.path))
        self._remembered = sha256
        self._digests.put(self._source.files, *self._before, sha256)
        return sha256


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
        self.check = CachedCheck(plan.source, cache, log)

    def known(self) -> tuple[str, ...]:
        """Those of the results `graph` and `engine` that are found without reading the checkpoint."""
        if not self.check.is_remembered:
            return ()
        entry = self._get("graph", self._graph_key(self._plan.static_sizes))
        if entry is None or (self._plan.options.validate and self._find_validation() is None):
            return ()
        config = self._plan.engine
        if config is None or config.build.timing_cache is not None:
            return ("graph",)
        key = _engine_key(
            entry.metadata["content"], profile_shapes(entry.metadata["description"], config), config
        )
        return ("graph", "engine") if self._get("engine", key) else ("graph",)

    def graph(self, graph: Graph) -> Graph:
        """`graph`, or the same one from the cache, which is not written until its file is needed."""
        if self._cache.root is None:
            return graph
        key = self._graph_key(self._plan.static_sizes)
        with self._cache.lock("graph", key, self._log):
            entry = None if graph.is_written else self._get("graph", key)
            if entry is None:
                self.keep_graph(graph)
                return graph
            self._log.log(f"graph: from the cache ({key[:12]})")
            self._replay(entry)
            return _CachedGraph(entry, graph, self, self._log)

    def validation(self, graph: Graph, validate: Callable[[], ValidationReport]) -> ValidationReport:
        """The result of `validate`, or that of an earlier run for the same `graph`."""
        if self._cache.root is None:
            return validate()
        key = self._graph_key({})
        with self._cache.lock("validation", key, self._log):
            entry = self._find_validation()
            if entry is not None:
                self._log.log(f"validation: from the cache ({key[:12]})")
                self._replay(entry)
                return _read_validation(entry.metadata["report"])
            self._make(graph)
            with self._log.record() as making:
                validation = validate()
            metadata = {
                "label": self._plan.summary,
                "report": dataclasses.asdict(validation),
                **self._recorded(making),
            }
            self._put("validation", self._graph_key({}), metadata, {})
            return validation

    def engine(self, graph: Graph, config: EngineConfig, path: Path, build: Callable[[], Engine]) -> Engine:
        """The result of `build`, or the engine of an earlier run, whose plan is put at `path`."""
        # Kernel timings are a result of the build too, which the cache does not keep.
        if self._cache.root is None or config.build.timing_cache is not None:
            return build()
        key = self._engine_key(graph, config)
        with self._cache.lock("engine", key, self._log), output_errors(self._plan.out):
            entry = self._get("engine", key)
            if entry is not None and (engine := self._take_engine(entry, path)) is not None:
                return engine
            assert graph.file
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
        """Make `graph` and keep it without its weights."""
        file = self._make(graph)
        with self._log.record() as digesting, self._log.measure("digest"):
            weights = _weights_digest(file, self._log)
        skeleton = _save_skeleton(graph.model, self._plan.source.weights(), graph.path.parent)
        digest = file_digest(skeleton)
        graph.content = cache_key({"weights": weights, "graph": digest.sha256})
        metadata = {
            "label": self._plan.summary,
            "description": graph.description,
            "remark": graph.remark,
            "content": graph.content,
            "weights": weights,
            **self._recorded(graph.recorded + digesting),
        }
        self._put("graph", self._graph_key(self._plan.static_sizes), metadata, {skeleton: digest})

    def restore_graph(self, entry: Entry, path: Path) -> WrittenGraph | None:
        """Write a graph from the cache to `path`; None if it is damaged or was removed, with a warning.

        Raises:
            CheckpointError: The source is not what its remembered digest says.
        """
        skeleton = path.parent / f"skeleton-{_FILE}"
        if not self._cache.extract(entry, _FILE, skeleton):
            self._log.warn(
                f"the graph {entry.key[:12]} in the cache is damaged or was removed: making it again"
            )
            return None
        model = load_onnx(skeleton)
        skeleton.unlink()
        weights = self._plan.source.weights()
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and Path(tensor.location).name == _PLACEHOLDER:
                value.const_value = _source_tensor(value, weights)
        complete = all(value.const_value is not None for value in model.graph.initializers.values())
        if complete:
            with self._log.measure("restore"):
                files = save_onnx(model, path, self._log)
                complete = _weights_digest(path, self._log) == entry.metadata["weights"]
        if complete:
            return WrittenGraph(model, files, entry.metadata["remark"])
        self._cache.evict(entry)
        self.check.forget()
        raise CheckpointError(_changed_unnoticed(self._plan.source.path))

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

    def _make(self, graph: Graph) -> Path:
        """The file of `graph`, made while the weights of the source are read."""
        self.check.start()
        return graph.file

    def _graph_key(self, sizes: Mapping[str, int]) -> str:
        """What a graph and its validation depend on, those `sizes` included that are static."""
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
                "sizes": dict(sizes),
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

    def _find_validation(self) -> Entry | None:
        return self._get("validation", self._graph_key({}))

    def _engine_key(self, graph: Graph, config: EngineConfig) -> str:
        return _engine_key(graph.content, profile_shapes(graph.description, config), config)

    def _take_engine(self, entry: Entry, path: Path) -> Engine | None:
        """The engine of `entry`, its plan put at `path`; None if it is damaged or was removed."""
        (name,) = entry.files
        with self._log.stage("read cache") as stage:
            stage.describe(f"engine {entry.key[:12]}")
            if not self._cache.extract(entry, name, path, replaces=self._plan.out):
                self._log.warn(
                    f"the engine {entry.key[:12]} in the cache is damaged or was removed: making it again"
                )
                return None
        self._log.log(f"engine: from the cache ({entry.key[:12]})")
        self._replay(entry)
        return Engine(path, EngineReport.from_json(entry.metadata["engine"]), entry.files[name])


class _CachedGraph(Graph):
    """A graph that was found; its file is written from the cache, or made if that fails."""

    def __init__(self, entry: Entry, made: Graph, cache: StageCache, log: RunLog) -> None:
        super().__init__(made.path, log, self._restore)
        self.content = entry.metadata["content"]
        self._entry = entry
        self._made = made
        self._cache = cache

    def _restore(self, path: Path) -> WrittenGraph:
        written = self._cache.restore_graph(self._entry, path)
        if written is not None:
            return written
        recorded = Recorded.from_json(self._entry.metadata["making"])
        self._log.forget({timing.name for timing in recorded.timings})
        self._cache.keep_graph(self._made)
        self.content = self._made.content
        return self._made.written

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


def _changed_unnoticed(path: Path) -> str:
    return (
        f"{path} was changed and has the size and times of before: its weights are not those that the cached "
        "results are for, which are removed now; run the command again"
    )


def _engine_key(content: str, profiles: Sequence[ProfileShapes], config: EngineConfig) -> str:
    """What an engine depends on: graph, profiles, options, library, and the GPU if it is built for one."""
    build = config.build
    options = build.to_json()
    del options["timing_cache"]
    options["plugins"] = [file_digest(library).sha256 for library in build.plugins]
    return cache_key(
        {
            "graph": content,
            "profiles": list(profiles),
            "options": options,
            "library": str(build.backend.load().__version__),
            "gpus": gpu_names() if build.backend.needs_gpu else [],
            "code": code_version(),
        }
    )


def _save_skeleton(model: ir.Model, weights: Mapping[str, ir.TensorProtocol], scratch: Path) -> Path:
    """Write `model` without those of its weights that are unchanged from the source; returns the file."""
    kept = {}
    for name, value in model.graph.initializers.items():
        tensor, original = value.const_value, _source_tensor(value, weights)
        unchanged = tensor is original or isinstance(tensor, ir.ExternalTensor | ir.LazyTensor)
        if tensor is None or original is None or not unchanged:
            continue
        kept[name] = tensor
        value.const_value = ir.ExternalTensor(
            _PLACEHOLDER, 0, tensor.nbytes, tensor.dtype, shape=value.shape or ir.Shape([]), name=name
        )
    directory = scratch / "skeleton"
    directory.mkdir(exist_ok=True)
    try:
        ir.save(model, directory / _FILE)
    finally:
        for name, tensor in kept.items():
            model.graph.initializers[name].const_value = tensor
    return directory / _FILE


def _source_tensor(value: ir.Value, weights: Mapping[str, ir.TensorProtocol]) -> ir.TensorProtocol | None:
    """The data of an initializer, read or quantized from the weights of the source; None for others."""
    tensor = weights.get(str(value.name))
    return tensor if tensor is not None else restored_tensor(value, weights)


def _weights_digest(path: Path, progress: Progress) -> str:
    """sha256, in hex, of names and bytes of all weights of the graph at `path`, sorted by name."""
    digest = hashlib.sha256()
    initializers = load_onnx(path).graph.initializers
    tensors = {
        name: value.const_value for name, value in initializers.items() if value.const_value is not None
    }
    with progress.stage("hash", total=sum(tensor.nbytes for tensor in tensors.values())) as stage:
        for name in sorted(tensors):
            digest.update(f"{name}\n".encode())
            tensor = tensors[name]
            digest.update(tensor.tobytes())
            stage.advance(tensor.nbytes)
            if isinstance(tensor, ir.ExternalTensor):
                # Otherwise every page that was read counts as memory of this process.
                tensor.release()
    return digest.hexdigest()


def _read_validation(report: Mapping[str, Any]) -> ValidationReport:
    outputs = tuple(OutputDifference(**output) for output in report["outputs"])
    unquantized = OutputDifference(**report["unquantized"]) if report["unquantized"] else None
    changed = {"outputs": outputs, "remarks": tuple(report["remarks"]), "unquantized": unquantized}
    return ValidationReport(**dict(report) | changed)

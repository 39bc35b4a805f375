"""The graph of an earlier export: its description, its validation, and the graph without its weights.

Weights are not kept. They are in the checkpoint, whose sha256 is part of the key; a graph that is needed
again is written from both, and its weights must have the digest that they had when it was validated.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sws_export.cache import Cache, Entry, cache_key, code_version
from sws_export.cache.store import file_digest
from sws_export.manifest import library_versions
from sws_export.onnx_files import load_onnx, save_onnx
from sws_export.options.options import ExportOptions, guard_options
from sws_export.pipeline.rewrite import Target
from sws_export.progress import Progress
from sws_export.sources.source import Source
from sws_export.stage_timings import StageTiming
from sws_export.validation import OutputDifference, ValidationReport

NOT_OF_THE_GRAPH = frozenset(
    {
        # For the engine, which has a key of its own.
        *("batch", "height", "width", "tokens", "vae_scale", "backend", "compute_capabilities"),
        *("optimization_level", "timing_cache", "refit", "strip_weights", "version_compatible"),
        *("hardware_compatible", "weight_streaming"),
        # Where the checkpoint is read from: the source says what was found there.
        *("config", "variant", "loras", "precision"),
        *("keep_onnx", "dry_run", "cache"),
    }
)
"""Options that make no other graph and no other validation."""

_FILE = "graph.onnx"
_PLACEHOLDER = "weights-of-the-source"


class StaleEntryError(Exception):
    """An entry that was found cannot be used and has been removed: begin again."""


@dataclasses.dataclass(frozen=True)
class Messages:
    """Remarks and warnings of the stages, to be repeated: (is a warning, text)."""

    lines: tuple[tuple[bool, str], ...] = ()

    def repeat(self, progress: Progress) -> None:
        """Say them again."""
        for warning, text in self.lines:
            (progress.warn if warning else progress.log)(text)


@dataclasses.dataclass(frozen=True)
class GraphRecord:
    """What is known about a graph once it was made.

    Attributes:
        description: What the ONNX file says of itself.
        validation: None where it was skipped.
        content: sha256, in hex, of the graph with its weights; empty where there is no cache.
        weights: sha256, in hex, of the weights by name.
        stages: What it cost to make.
        check: What the look at the weights said.
        making: What the other stages said.
    """

    description: dict[str, Any]
    validation: ValidationReport | None
    content: str
    weights: str
    stages: tuple[StageTiming, ...]
    check: Messages
    making: Messages


def graph_key(
    source: Source, sha256: str, options: ExportOptions, target: Target, sizes: Mapping[str, int]
) -> str:
    """What the graph of an export and its validation depend on.

    Args:
        source: The checkpoint or plain graph.
        sha256: Of its files.
        options: All but `NOT_OF_THE_GRAPH` count, so that an option added later does.
        target: Runtime that the graph is for.
        sizes: Sizes that the graph is fixed to.
    """
    chosen = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in NOT_OF_THE_GRAPH
    }
    guard = guard_options(options)
    return cache_key(
        {
            "source": source.identity(sha256),
            "precision": source.precision,
            "options": chosen | {"parameters": dataclasses.asdict(options.parameters)},
            "guard": [guard.form, str(guard.rows)],
            "target": target,
            "sizes": dict(sizes),
            "versions": library_versions(("onnxruntime", "numpy", "polygraphy")),
            "code": code_version(),
        }
    )


def find_graph(cache: Cache, key: str) -> tuple[Entry, GraphRecord] | None:
    """The graph of `key`, if it is in the cache."""
    entry = cache.find("graph", key)
    if entry is None:
        return None
    facts = entry.facts
    return entry, GraphRecord(
        description=facts["description"],
        validation=_read_validation(facts["validation"]),
        content=facts["content"],
        weights=facts["weights"],
        stages=tuple(StageTiming(**figures) for figures in facts["stages"]),
        check=_read_said(facts["check"]),
        making=_read_said(facts["making"]),
    )


def store_graph(
    cache: Cache, key: str, skeleton: Path, facts: GraphRecord, what: str, progress: Progress
) -> None:
    """Keep a graph with the skeleton that `save_skeleton` wrote; `what` is for those who read the list."""
    known = dataclasses.asdict(facts) | {"what": what}
    cache.store("graph", key, known, {skeleton: file_digest(skeleton)}, progress)


def save_skeleton(model: ir.Model, weights: Mapping[str, ir.TensorProtocol], scratch: Path) -> Path:
    """Write `model` without those of its weights that are still the source's own; returns the file."""
    kept = {}
    for name, value in model.graph.initializers.items():
        tensor, original = value.const_value, weights.get(name)
        untouched = tensor is original or isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor))
        if tensor is None or original is None or not untouched:
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


def write_graph(
    cache: Cache, entry: Entry, facts: GraphRecord, source: Source, path: Path, progress: Progress
) -> None:
    """Write a graph from the cache to `path`, with the weights of `source`.

    Raises:
        StaleEntryError: The entry is gone or damaged, or these are not the weights it was validated with.
    """
    skeleton = path.parent / f"skeleton-{_FILE}"
    if not cache.take(entry, _FILE, skeleton):
        raise StaleEntryError(f"the graph {entry.key[:12]} in the cache is damaged or was removed")
    model = load_onnx(skeleton)
    weights = source.weights()
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) == _PLACEHOLDER:
            value.const_value = weights.get(name)
    skeleton.unlink()
    if any(value.const_value is None for value in model.graph.initializers.values()):
        cache.discard(entry)
        raise StaleEntryError(f"the graph {entry.key[:12]} in the cache is of other weights")
    save_onnx(model, path, progress)
    if weights_digest(path, progress) != facts.weights:
        cache.discard(entry)
        cache.digests.forget(source.files)
        raise StaleEntryError(f"the weights of {source.path} are not those that were validated")


def weights_digest(path: Path, progress: Progress) -> str:
    """sha256, in hex, of names and bytes of all weights of the graph at `path`, in order of their names."""
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
                # Else every page of the file that was read counts as memory of this process.
                tensor.release()
    return digest.hexdigest()


def find_validation(cache: Cache, key: str) -> tuple[ValidationReport, StageTiming] | None:
    """What a validation found that is in the cache, and what it cost."""
    entry = cache.find("validation", key)
    validation = _read_validation(entry.facts["report"]) if entry else None
    return (validation, StageTiming(**entry.facts["stage"])) if entry and validation else None


def store_validation(
    cache: Cache,
    key: str,
    validation: ValidationReport,
    figures: StageTiming,
    what: str,
    progress: Progress,
) -> None:
    """Keep what the validation of a graph of any size found."""
    known = {
        "report": dataclasses.asdict(validation),
        "stage": dataclasses.asdict(figures),
        "what": what,
    }
    cache.store("validation", key, known, {}, progress)


def _read_validation(facts: dict[str, Any] | None) -> ValidationReport | None:
    if facts is None:
        return None
    outputs = tuple(OutputDifference(**output) for output in facts["outputs"])
    return ValidationReport(**facts | {"outputs": outputs, "remarks": tuple(facts["remarks"])})


def _read_said(facts: dict[str, Any]) -> Messages:
    return Messages(tuple((bool(warning), str(text)) for warning, text in facts["lines"]))

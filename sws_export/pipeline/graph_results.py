"""The graph of an export with its validation: from the cache, or made and compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sws_export import manifest as manifests
from sws_export.cache import Entry, cache_key
from sws_export.cache.digests import stamps
from sws_export.cache.store import file_digest
from sws_export.pipeline.cached_graph import (
    GraphRecord,
    Messages,
    find_graph,
    graph_key,
    save_skeleton,
    store_graph,
    weights_digest,
    write_graph,
)
from sws_export.pipeline.graph import GraphMaking
from sws_export.pipeline.job import Job
from sws_export.progress import Recording
from sws_export.stage_timings import StageLog

Wanted = Callable[[GraphRecord], bool]
"""Whether the file of a graph that was found is needed."""


def obtain_graph(job: Job, path: Path, log: StageLog, wanted: Wanted) -> GraphRecord:
    """Find the graph of an export in the cache, or make it.

    Args:
        job: The export.
        path: Where the graph goes; a graph from the cache only where it is `wanted`.
        log: Takes times and memory.
        wanted: Asked once the graph is known.

    Raises:
        SwsExportError: The weights are broken, or the graph differs from the reference.
        StaleEntryError: What was found cannot be used and has been removed.
    """
    sha256 = job.cache.digests.recall(job.source.files)
    description, check = None, Messages()
    if sha256 is None:
        description, check = _check(job, log)
        sha256 = description["sha256"]
    key = _key(job, sha256)
    with job.cache.exclusive("graph", key, job.progress):
        found = find_graph(job.cache, key)
        if found is not None:
            return _recall(job, *found, path, log, wanted)
        if description is None:
            description, check = _check(job, log)
            # Another one only if the file was changed without a trace.
            key = _key(job, description["sha256"])
        return _make(job, key, description, check, path, log)


def known_graph(job: Job) -> GraphRecord | None:
    """The graph of an export, if it is known without reading the weights that it is in the cache."""
    sha256 = job.cache.digests.recall(job.source.files)
    found = find_graph(job.cache, _key(job, sha256)) if sha256 else None
    return found[1] if found else None


def _key(job: Job, sha256: str) -> str:
    return graph_key(job.source, sha256, job.options, job.target, job.sizes)


def _check(job: Job, log: StageLog) -> tuple[dict[str, Any], Messages]:
    """Look at every weight, and remember the digest of the files."""
    before, began = stamps(job.source.files)
    recording = Recording(job.progress)
    with log.measure("check"):
        description = job.source.verify(recording)
    job.cache.digests.remember(job.source.files, before, began, description["sha256"])
    return description, Messages(tuple(recording.lines))


def _recall(
    job: Job, entry: Entry, facts: GraphRecord, path: Path, log: StageLog, wanted: Wanted
) -> GraphRecord:
    """Take over a graph of an earlier run, and write it where it is wanted."""
    what = "graph and validation" if facts.validation else "graph"
    job.progress.log(f"{what}: from the cache ({entry.key[:12]})")
    done = {figures.name for figures in log.stages}
    if "check" not in done:
        facts.check.repeat(job.progress)
    facts.making.repeat(job.progress)
    for figures in facts.stages:
        if figures.name == "save" and wanted(facts):
            with log.measure("save"):
                write_graph(job.cache, entry, facts, job.source, path, job.progress)
        elif figures.name not in done:
            log.recall(figures)
    return facts


def _make(
    job: Job, key: str, description: dict[str, Any], check: Messages, path: Path, log: StageLog
) -> GraphRecord:
    recording = Recording(job.progress)
    weights = job.source.weights() if job.cache.root else {}
    general = graph_key(job.source, description["sha256"], job.options, job.target, {})
    model, validation = GraphMaking(job, description, general, log, recording).make(path)
    skeleton = save_skeleton(model, weights, path.parent) if job.cache.root else None
    digest = ""
    if skeleton:
        with log.measure("digest"):
            digest = weights_digest(path, job.progress)
    facts = GraphRecord(
        description=manifests.embedded(model) or {},
        validation=validation,
        content=cache_key({"weights": digest, "graph": file_digest(skeleton).sha256}) if skeleton else "",
        weights=digest,
        stages=tuple(log.stages),
        check=check,
        making=Messages(tuple(recording.lines)),
    )
    if skeleton:
        store_graph(job.cache, key, skeleton, facts, job.what, job.progress)
    return facts

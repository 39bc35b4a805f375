"""The engine of an earlier export."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from sws_export.cache import Cache, Entry, FileDigest, cache_key, code_version
from sws_export.engines import BuildOptions, EngineReport
from sws_export.engines.gpu import gpu_names
from sws_export.pipeline.cached_graph import StaleEntryError
from sws_export.progress import Progress
from sws_export.stage_timings import StageTiming
from sws_export.tensors import Shapes


def engine_key(content: str, shapes: Shapes, build: BuildOptions) -> str:
    """What an engine depends on: graph, profile, options, library, and the GPU where it is built for one.

    Args:
        content: sha256 of the graph with its weights.
        shapes: Smallest, best and largest shape of each input.
        build: How it is built.
    """
    options = build.to_json()
    del options["timing_cache"]
    options["plugins"] = [hashlib.sha256(library.read_bytes()).hexdigest() for library in build.plugins]
    return cache_key(
        {
            "graph": content,
            "shapes": shapes,
            "options": options,
            "library": str(build.backend.load().__version__),
            "gpus": gpu_names() if build.backend.needs_gpu else [],
            "code": code_version(),
        }
    )


def store_engine(
    cache: Cache,
    key: str,
    plan: Path,
    facts: FileDigest,
    engine: EngineReport,
    figures: StageTiming,
    what: str,
    progress: Progress,
) -> None:
    """Keep the plan; `what` tells a reader of the list what it is."""
    known = {"what": what, "engine": dataclasses.asdict(engine), "stage": dataclasses.asdict(figures)}
    cache.store("engine", key, known, {plan: facts}, progress)


def take_engine(
    cache: Cache, entry: Entry, place: Path, out: Path, progress: Progress
) -> tuple[EngineReport, StageTiming, FileDigest]:
    """Put the plan of `entry` at `place`, to replace `out`.

    Raises:
        StaleEntryError: It is gone or damaged, and removed.
        OSError: `place` cannot be written.
    """
    (name,) = entry.files
    with progress.stage("read cache") as stage:
        stage.describe(f"engine {entry.key[:12]}")
        if not cache.take(entry, name, place, replaces=out):
            raise StaleEntryError(f"the engine {entry.key[:12]} in the cache is damaged or was removed")
    engine: dict[str, Any] = entry.facts["engine"]
    report = EngineReport(**engine | {"compute_capabilities": tuple(engine["compute_capabilities"])})
    return report, StageTiming(**entry.facts["stage"]), entry.files[name]

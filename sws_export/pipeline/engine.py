"""The engine of an export."""

import dataclasses
from pathlib import Path

from sws_export.engines.build import EngineReport, build_engine
from sws_export.engines.gpu_memory import add_states
from sws_export.errors import EngineError
from sws_export.files import FileDigest, file_digest
from sws_export.manifest import GraphDescription, tensor_specs
from sws_export.pipeline.graph import Graph
from sws_export.pipeline.plan import EngineConfig
from sws_export.pipeline.run_log import RunLog
from sws_export.tensors import ProfileShapes, shapes_for


@dataclasses.dataclass(frozen=True)
class BuiltEngine:
    """An engine that was built.

    Attributes:
        path: The plan.
        report: How it was built.
        digest: Size and sha256 of the plan.
    """

    path: Path
    report: EngineReport
    digest: FileDigest


def make_engine(graph: Graph, config: EngineConfig, path: Path, log: RunLog) -> BuiltEngine:
    """Build the engine of `graph` and write its plan to `path`.

    Raises:
        EngineError: The backend rejected the graph, failed or was killed.
        OptionError: The sizes do not fit the graph.
        OSError: `path` cannot be written.
    """
    file, profiles = graph.write().path, profile_shapes(graph.description, config)
    with log.measure("build") as timing:
        report = build_engine(file, path, profiles, config.build, log)
        timing.peak_memory = report.peak_memory
    if report.gpu_memory is not None:
        states = [state["input"] for state in graph.description["states"]]
        memory = add_states(report.gpu_memory, profiles, states)
        report = dataclasses.replace(report, gpu_memory=memory)
    with log.stage("hash"):
        return BuiltEngine(path, report, file_digest(path))


def check_gpu_memory(report: EngineReport, config: EngineConfig) -> None:
    """Reject an engine that needs more GPU memory than `--max-gpu-memory` allows.

    Raises:
        EngineError: It needs more, or its needs are unknown.
    """
    build, memory = config.build, report.gpu_memory
    limit = build.gpu_memory_limit
    if limit is None:
        return
    if memory is None:
        raise EngineError(
            f"--max-gpu-memory {build.max_gpu_memory}: {report.backend} {report.library_version} did not "
            "report how much GPU memory the engine needs; nothing was written. Leave the option out"
        )
    if memory.total(memory.largest) > limit:
        raise EngineError(
            f"the engine {memory.describe(memory.largest)} ({config.profiles[memory.largest]}), more than "
            f"--max-gpu-memory {build.max_gpu_memory}; nothing was written. Choose a smaller --batch, "
            "--height or --width, or a higher limit"
        )


def profile_shapes(description: GraphDescription, config: EngineConfig) -> tuple[ProfileShapes, ...]:
    """Smallest, optimal and largest shape of each input, by profile, from the description of a graph."""
    inputs = tensor_specs(description["inputs"])
    return tuple(shapes_for(inputs, sizes) for sizes in config.profiles)

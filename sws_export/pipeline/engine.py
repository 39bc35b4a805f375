"""The engine of an export."""

import dataclasses
from pathlib import Path

from sws_export.cache.store import FileDigest, file_digest
from sws_export.engines.build import EngineReport, build_engine
from sws_export.engines.gpu_memory import add_states
from sws_export.manifest import GraphDescription, tensor_specs
from sws_export.pipeline.graph import Graph
from sws_export.pipeline.plan import EngineConfig
from sws_export.pipeline.run_log import RunLog
from sws_export.tensors import ProfileShapes, shapes_for


@dataclasses.dataclass(frozen=True)
class Engine:
    """An engine that was built.

    Attributes:
        path: The plan.
        report: How it was built.
        digest: Size and sha256 of the plan.
    """

    path: Path
    report: EngineReport
    digest: FileDigest


def make_engine(graph: Graph, config: EngineConfig, path: Path, log: RunLog) -> Engine:
    """Build the engine of `graph` and write its plan to `path`.

    Raises:
        EngineError: The backend refused the graph, failed or was killed.
        OptionError: The sizes do not fit the graph.
        OSError: `path` cannot be written.
    """
    file, shapes = graph.file, profile_shapes(graph.description, config)
    with log.measure("build") as timing:
        report = build_engine(file, path, shapes, config.build, log)
        timing.peak_memory = report.peak_memory
    if report.gpu_memory is not None:
        states = [state["input"] for state in graph.description["states"]]
        memory = add_states(report.gpu_memory, [shapes], states)
        report = dataclasses.replace(report, gpu_memory=memory)
    with log.stage("hash"):
        return Engine(path, report, file_digest(path))


def profile_shapes(description: GraphDescription, config: EngineConfig) -> ProfileShapes:
    """Smallest, optimal and largest shape of each input, from the description of a graph."""
    return shapes_for(tensor_specs(description["inputs"]), config.sizes)

"""GPU time of each node of an ONNX Runtime session, which its own profile does not have.

PyTorch's profiler records the kernels of the whole process and when each was launched; ONNX Runtime's profile
records when each node ran on the CPU. A kernel belongs to the node that ran while it was launched.
"""

import bisect
import collections
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclasses.dataclass(frozen=True)
class NodeRun:
    """One run of a node on the CPU; nanoseconds of the system clock."""

    node: str
    operator: str
    provider: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class GpuWork:
    """A kernel or a copy: when it was launched, in nanoseconds of the system clock, and how long it ran."""

    name: str
    launched: int
    microseconds: float


def node_runs(trace: Path, start: int) -> list[NodeRun]:
    """The runs of nodes in ONNX Runtime's profile, which began at `start`, in order."""
    runs = [
        NodeRun(
            event["name"].removesuffix("_kernel_time"),
            event["args"]["op_name"],
            event["args"]["provider"],
            start + 1000 * event["ts"],
            start + 1000 * (event["ts"] + event["dur"]),
        )
        for event in json.loads(trace.read_text())
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]
    return sorted(runs, key=lambda run: run.start)


def gpu_works(trace: Mapping[str, Any]) -> list[GpuWork]:
    """The kernels and copies in a trace of PyTorch's profiler."""
    base = int(trace["baseTimeNanoseconds"])
    events: Sequence[Mapping[str, Any]] = trace["traceEvents"]
    launched = {
        event["args"]["correlation"]: base + round(1000 * event["ts"])
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    return [
        GpuWork(event["name"], launched[event["args"]["correlation"]], event["dur"])
        for event in events
        if event.get("cat") in GPU_WORK and event["args"].get("correlation") in launched
    ]


def by_node(works: Iterable[GpuWork], runs: Sequence[NodeRun]) -> list[tuple[GpuWork, NodeRun | None]]:
    """Each piece of work with the node that ran while it was launched; None if no node did."""
    starts = [run.start for run in runs]
    pairs: list[tuple[GpuWork, NodeRun | None]] = []
    for work in works:
        index = bisect.bisect_right(starts, work.launched) - 1
        inside = index >= 0 and work.launched <= runs[index].end
        pairs.append((work, runs[index] if inside else None))
    return pairs


def times_by_operator(pairs: Iterable[tuple[GpuWork, NodeRun | None]]) -> dict[str, dict[str, float]]:
    """Microseconds and number of kernels of each type of operator, the longest first."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    for work, run in pairs:
        times[run.operator if run else "none"].append(work.microseconds)
    ordered = sorted(times.items(), key=lambda item: -sum(item[1]))
    return {name: {"microseconds": round(sum(all_), 1), "kernels": len(all_)} for name, all_ in ordered}


def write_nodes(path: Path, pairs: Iterable[tuple[GpuWork, NodeRun | None]]) -> None:
    """Write one line for each kernel: node, operator, name of the kernel, microseconds."""
    rows = [
        [run.node if run else "", run.operator if run else "", work.name[:80], round(work.microseconds, 2)]
        for work, run in pairs
    ]
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def record_kernels(
    session: Any, step: Callable[[], None], prefix: Path
) -> tuple[list[NodeRun], list[GpuWork]]:
    """Run a few steps of a session whose profile is on; what its nodes and the GPU did in the last one.

    Args:
        session: Ends its profile.
        step: Runs one step and waits for it.
        prefix: Of a file that PyTorch's trace is written to.
    """
    import torch

    for _ in range(3):  # searches for convolution algorithms, and allocations
        step()
    begin = time.time_ns()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorder:
        step()
    start = session.get_profiling_start_time_ns()
    runs = [run for run in node_runs(Path(session.end_profiling()), start) if run.start >= begin]
    trace = prefix.with_suffix(".trace.json")
    recorder.export_chrome_trace(str(trace))
    return runs, gpu_works(json.loads(trace.read_text()))

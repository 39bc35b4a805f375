"""The ONNX Runtime and TensorRT for RTX cases of benchmarks/step.py."""

import collections
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from step_cases import MODELS, Case

WARM_UP = 2
"""Steps before the timed ones: ONNX Runtime plans its memory in the first and allocates it in the second."""


def number_of_steps(repeats: int) -> int:
    """All steps of a measurement."""
    return WARM_UP + repeats if repeats else 1


def measure(step: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Wall and CPU seconds of the fastest of `repeats` steps after the warm-up, and peak memory in bytes.

    With `repeats` 0 the only step is measured. CPU seconds count all threads; other work on the machine
    disturbs them less than the wall time.
    """
    wall, cpu = [], []
    for _ in range(number_of_steps(repeats)):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - cpu_begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    timed = slice(WARM_UP, None) if repeats else slice(None)
    return {"seconds": min(wall[timed]), "cpu_seconds": min(cpu[timed]), "peak_bytes": peak}


def inputs_for(shapes: dict[str, tuple[list[Any], Any]], case: Case) -> dict[str, Any]:
    """Inputs by name; within a group they differ in sigma and intensity only."""
    side = MODELS[case.model].side
    known = {"batch": case.batch, "tokens": 77, "height": side, "width": side}
    feed = {}
    for name, (shape, dtype) in shapes.items():
        dims = [dim if isinstance(dim, int) else _size(dim, known) for dim in shape]
        levels = {"sigma": case.sigma, "intensity": case.intensity, "timestep": 500.0}
        if name in levels:
            value: Any = np.full(dims, levels[name])
        elif name.startswith("sws_state"):
            value = np.zeros(dims)
        else:
            value = np.random.default_rng(len(name)).standard_normal(dims)
        feed[name] = value.astype(dtype)
    return feed


def _size(dim: str, known: dict[str, int]) -> int:
    name, _, divisor = dim.partition("/")
    return known[name] // int(divisor or 1)


def run_graph(path: Path, case: Case, threads: int) -> dict[str, Any]:
    """Measure a step in ONNX Runtime, and count the `Attention` nodes that ran (branches taken only).

    ONNX Runtime computes float16 graphs in float32 on a CPU and would keep all weights in float32. For these
    graphs, graph optimizations, prepacking and the arena are disabled, so that weights stay in the mapped
    file and are converted when they are used.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Spinning threads would count as CPU time.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    lean = MODELS[case.model].precision == "fp16"
    if lean:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        begin = time.perf_counter()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        load = time.perf_counter() - begin
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        shapes = {value.name: (value.shape, dtypes[value.type]) for value in session.get_inputs()}
        feed = inputs_for(shapes, case)
        result = measure(lambda: session.run(None, feed), case.repeats)
        runs = number_of_steps(case.repeats)
        attentions = executed_nodes(Path(session.end_profiling()))["Attention"] // runs
    return result | {"load_seconds": load, "lean": lean, "attentions": attentions}


def executed_nodes(profile: Path) -> collections.Counter[str]:
    """Number of executed nodes of each operator type."""
    return collections.Counter(
        event["args"]["op_name"]
        for event in json.loads(profile.read_text("utf-8"))
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    )


def build_rtx(path: Path) -> dict[str, Any]:
    """Build an engine for batches 1 to 2 at the size of the graph; time, memory and size of the build."""
    import onnx

    from sws_export.engines.backend import BuildOptions
    from sws_export.engines.build import build_engine
    from sws_export.engines.tensorrt_rtx import BACKEND

    shapes = {}
    for value in onnx.load(path, load_external_data=False).graph.input:
        dims = [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        shapes[value.name] = tuple(
            tuple(batch if dim == "batch" else dim for dim in dims) for batch in (1, 2, 2)
        )
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = build_engine(
            path, Path(folder) / "plan", [shapes], BuildOptions(BACKEND, compute_capabilities=("8.9",))
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": report.parse_seconds + report.build_seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_bytes": report.peak_memory,
        "plan_bytes": report.size,
        "layers": report.layers,
        "decomposed_attentions": report.decomposed_attentions,
        "library": report.library_version,
    }

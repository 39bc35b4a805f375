"""Kernels are attributed to the node that ran while they were launched."""

import json
from pathlib import Path

from benchmarks.gpu.kernel_times import GpuWork, by_node, gpu_works, node_runs, times_by_operator, write_nodes

START = 1_000_000


def node(name: str, operator: str, microsecond: int, duration: int) -> dict[str, object]:
    args = {"op_name": operator, "provider": "CUDAExecutionProvider"}
    return {
        "cat": "Node", "name": f"{name}_kernel_time", "ts": microsecond, "dur": duration, "args": args
    }  # fmt: skip


def kernel(correlation: int, launched: float, microseconds: float, category: str = "kernel") -> list[object]:
    args = {"correlation": correlation}
    return [
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": launched, "dur": 3, "args": args},
        # It runs later than it was launched, beside another node.
        {
            "cat": category,
            "name": f"kernel {correlation}",
            "ts": launched + 50,
            "dur": microseconds,
            "args": args,
        },
    ]


def test_times_of_nodes_and_operators(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    events = [
        node("second", "Mul", 20, 10),
        node("first", "Conv", 0, 15),
        {"cat": "Session", "name": "model_run", "ts": 0, "dur": 99},
        {"cat": "Node", "name": "first_fence_before", "ts": 0, "dur": 1, "args": {"op_name": "Conv"}},
    ]
    profile.write_text(json.dumps(events))
    base = 400_000
    trace = {
        "baseTimeNanoseconds": base,
        # Microseconds after the base; the profile began 600 after it.
        "traceEvents": [
            *kernel(1, 601, 7.0),
            *kernel(2, 612, 2.0, "gpu_memset"),
            *kernel(3, 625, 4.0),
            *kernel(4, 617, 1.0),  # between the nodes
            {"cat": "kernel", "name": "of another context", "ts": 1, "dur": 9, "args": {"correlation": 99}},
        ],
    }

    runs = node_runs(profile, START)
    pairs = by_node(gpu_works(trace), runs)

    assert [run.node for run in runs] == ["first", "second"]
    assert [run.node if run else None for _, run in pairs] == ["first", "first", "second", None]
    assert times_by_operator(pairs) == {
        "Conv": {"microseconds": 9.0, "kernels": 2},
        "Mul": {"microseconds": 4.0, "kernels": 1},
        "none": {"microseconds": 1.0, "kernels": 1},
    }
    write_nodes(tmp_path / "nodes.json", pairs)
    assert json.loads((tmp_path / "nodes.json").read_text())[2] == ["second", "Mul", "kernel 3", 4.0]


def test_work_before_the_first_node_belongs_to_none() -> None:
    assert by_node([GpuWork("early", 5, 1.0)], []) == [(GpuWork("early", 5, 1.0), None)]

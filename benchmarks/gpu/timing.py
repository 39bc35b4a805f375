"""Time GPU work by replaying it as a CUDA graph between two events."""

import statistics
from collections.abc import Callable

import torch

WARM_UP_RUNS = 3
SAMPLES = 21
SAMPLE_MILLISECONDS = 5.0


def time_graph(work: Callable[[], object]) -> float:
    """Microseconds of one run of `work`: median over samples of a few milliseconds of graph replays."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_RUNS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    torch.cuda.synchronize()
    repeats = max(1, round(SAMPLE_MILLISECONDS / max(_elapsed(graph, 10) / 10, 1e-3)))
    return statistics.median(1000 * _elapsed(graph, repeats) / repeats for _ in range(SAMPLES))


def _elapsed(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Milliseconds of `repeats` replays."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written together, of a large copy in device memory."""
    source = torch.empty(2**28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (time_graph(lambda: target.copy_(source)) * 1e-6)


def matmul_rate(device: str) -> float:
    """Floating-point operations a second of a large bfloat16 matrix product."""
    size = 8192
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / (time_graph(lambda: torch.mm(a, b, out=out)) * 1e-6)

"""Times work on the GPU by replaying it as a CUDA graph between two events."""

import statistics
from collections.abc import Callable, Sequence

import torch

WARM_UP_RUNS = 3
SAMPLES = 15
SAMPLE_MILLISECONDS = 5.0
MAX_SETS = 64
_DEFAULT_L2_BYTES = 64 * 2**20

Work = Callable[[], object]


def input_sets(nbytes: int) -> int:
    """Number of sets of inputs of `nbytes` to rotate through, so that L2 does not hold the next set.

    They fill the cache twice, unless MAX_SETS is reached.
    """
    properties = torch.cuda.get_device_properties(0)
    cache = int(getattr(properties, "L2_cache_size", 0)) or _DEFAULT_L2_BYTES
    return max(1, min(MAX_SETS, -(-2 * cache // max(nbytes, 1))))


def time_graph(works: Sequence[Work]) -> float:
    """Microseconds of one of `works`, which are the same work on different inputs.

    One CUDA graph runs them one after the other; the result is the median over samples of a few milliseconds.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_RUNS):
            works[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    graph.replay()
    torch.cuda.synchronize()
    once = _elapsed(graph, 3) / 3
    repeats = max(1, round(SAMPLE_MILLISECONDS / max(once, 1e-3)))
    samples = [1000 * _elapsed(graph, repeats) / repeats / len(works) for _ in range(SAMPLES)]
    return statistics.median(samples)


def _elapsed(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Milliseconds of `repeats` replays."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def copy_bandwidth(device: str, elements: int) -> float:
    """Bytes a second, read and written together, of a copy of float32 elements in device memory."""
    source = torch.empty(elements, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (time_graph([lambda: target.copy_(source)]) * 1e-6)


def matmul_rate(device: str, size: int) -> float:
    """Floating-point operations a second of a bfloat16 product of matrices [size, size]."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / (time_graph([lambda: torch.mm(a, b, out=out)]) * 1e-6)

"""Wall time and peak memory of the stages of a run."""

import contextlib
import ctypes
import dataclasses
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

# A garbage collection takes a third of a second once torch is loaded: only after stages that used memory.
_COLLECT_ABOVE = 200_000_000
# New objects before a collection of the youngest generation; 700 or 2000 by default.
_COLLECT_AFTER = 100_000


@dataclasses.dataclass
class StageTiming:
    """Cost of one stage.

    Attributes:
        name: Name of the stage.
        seconds: Wall time.
        peak_memory: Largest resident memory of the process in bytes.
        cached: Whether the result was taken from the cache; time and memory are those of the original run.
    """

    name: str
    seconds: float
    peak_memory: int
    cached: bool = False


@contextlib.contextmanager
def measure_stage(name: str) -> Iterator[StageTiming]:
    """Measure the block. The block may raise `peak_memory` to that of a child process."""
    _reset_peak_memory()
    before = peak_memory()
    timing = StageTiming(name, 0.0, 0)
    start = time.monotonic()
    yield timing
    timing.seconds = time.monotonic() - start
    peak = peak_memory()
    timing.peak_memory = max(timing.peak_memory, peak)
    if peak - before > _COLLECT_ABOVE:
        _trim_memory()


@contextlib.contextmanager
def rare_garbage_collection() -> Iterator[None]:
    """Let the garbage collector run less often in the block.

    Imports and graph passes create many objects that live on. With the default threshold, a tenth of an
    export was garbage collection.
    """
    before = gc.get_threshold()
    gc.set_threshold(_COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def peak_memory(pid: int | None = None) -> int:
    """Largest resident memory of a process so far, in bytes; 0 for a process that has ended.

    Without /proc (other systems than Linux) it is the resident memory at the moment.

    Args:
        pid: Process ID; None for this process.
    """
    # Not getrusage: its value for a child process starts at the size of the parent that forked it.
    try:
        status = Path(f"/proc/{'self' if pid is None else pid}/status").read_text()
    except OSError:
        try:
            return int(psutil.Process(pid).memory_info().rss)
        except psutil.Error:
            return 0
    peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(peaks[0]) * 1024 if peaks else 0


def _trim_memory() -> None:
    """Return freed memory to the system (glibc only).

    Memory freed after validation otherwise stays with this process, while the engine build needs it.
    """
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _reset_peak_memory() -> None:
    """Reset the largest resident memory of this process (Linux, if the kernel allows it)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")

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

# Looking through all objects for freed ones takes a third of a second once torch is loaded.
_WORTH_COLLECTING = 200_000_000


@dataclasses.dataclass
class StageTiming:
    """What one stage cost: seconds of wall time, and the process's largest resident memory in bytes.

    `cached` says that this run found the result; the figures are those of the run that made it.
    """

    name: str
    seconds: float
    peak_memory: int
    cached: bool = False


@contextlib.contextmanager
def measure_stage(name: str) -> Iterator[StageTiming]:
    """Measure the block; larger values that the block sets itself (those of a child process) are kept."""
    _reset_peak()
    before = _peak()
    timing = StageTiming(name, 0.0, 0)
    start = time.monotonic()
    yield timing
    timing.seconds = time.monotonic() - start
    peak = _peak()
    timing.peak_memory = max(timing.peak_memory, peak)
    if peak - before > _WORTH_COLLECTING:
        _give_back_memory()


def _give_back_memory() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    What validation freed otherwise stays with this process, and the engine build beside it needs it.
    """
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> None:
    """Forget the largest resident memory so far, where the kernel allows it (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return int(psutil.Process().memory_info().rss)
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))

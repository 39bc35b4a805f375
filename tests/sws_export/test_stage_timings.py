"""Wall time and peak memory of a stage."""

import sys

import numpy as np
import psutil
import pytest

from sws_export.stage_timings import measure_stage

SIZE = 300_000_000


def test_peak_memory_is_measured_per_stage() -> None:
    with measure_stage("large") as large:
        np.ones(SIZE, np.uint8)
    with measure_stage("small") as small:
        pass
    assert (large.name, small.name) == ("large", "small")
    assert large.peak_memory > SIZE
    assert large.peak_memory - small.peak_memory > SIZE // 2


def test_the_larger_peak_of_a_child_process_is_kept() -> None:
    with measure_stage("build") as timing:
        timing.peak_memory = 10**15
    assert timing.peak_memory == 10**15


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can give memory back on request")
def test_freed_memory_is_returned_to_the_system() -> None:
    process = psutil.Process()
    with measure_stage("many small objects"):
        # Small blocks come from the heap, which glibc does not shrink when they are freed.
        blocks = [bytearray(4000) for _ in range(SIZE // 4000)]
        last = bytearray(4000)
        del blocks
        before = process.memory_info().rss
    assert before - process.memory_info().rss > SIZE // 2
    del last

"""Figures of the stages of a run."""

import sys

import numpy as np
import psutil
import pytest

from sws_export.stage_timings import StageLog

SIZE = 300_000_000


def test_a_stage_has_its_own_peak_and_the_next_one_does_not_inherit_it() -> None:
    log = StageLog()
    with log.measure("large"):
        np.ones(SIZE, np.uint8)
    with log.measure("small"):
        pass
    large, small = log.stages
    assert (large.name, small.name) == ("large", "small")
    assert large.peak_memory > SIZE
    assert large.peak_memory - small.peak_memory > SIZE // 2


def test_the_larger_figure_of_a_child_process_stays() -> None:
    log = StageLog()
    with log.measure("build") as figures:
        figures.peak_memory = 10**15
    assert log.stages[0].peak_memory == 10**15


def test_a_stage_that_fails_is_not_listed() -> None:
    log = StageLog()
    with pytest.raises(ValueError, match="no"), log.measure("export"):
        raise ValueError("no")
    assert log.stages == []


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can give memory back on request")
def test_memory_that_a_stage_freed_is_given_back() -> None:
    process, log = psutil.Process(), StageLog()
    with log.measure("many small objects"):
        # Small blocks come from the heap, which glibc keeps when they are freed.
        blocks = [bytearray(4000) for _ in range(SIZE // 4000)]
        last = bytearray(4000)
        del blocks
        before = process.memory_info().rss
    assert before - process.memory_info().rss > SIZE // 2
    del last

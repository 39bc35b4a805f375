"""The log of a run: messages, timings, and their replay from the cache."""

import pytest

from sws_export.pipeline.run_log import Recorded, RunLog
from sws_export.progress import SilentProgress
from tests.export_runs import RecordingProgress


def test_a_part_of_a_run_is_recorded_and_replayed() -> None:
    shown = RecordingProgress(SilentProgress())
    log = RunLog(shown)
    log.log("before")
    with log.record() as outer, log.measure("export"):
        log.log("a remark")
        with log.record() as inner:
            log.warn("a warning")
    assert outer.messages == [(False, "a remark"), (True, "a warning")]
    assert inner.messages == [(True, "a warning")]
    assert [timing.name for timing in outer.timings] == ["export"]
    assert shown.lines == [(False, "before"), *outer.messages]

    later = RecordingProgress(SilentProgress())
    again = RunLog(later)
    again.replay(Recorded.from_json(outer.to_json()))
    assert later.lines == outer.messages
    assert [(timing.name, timing.cached) for timing in again.timings] == [("export", True)]
    assert again.timings[0].peak_memory == outer.timings[0].peak_memory


def test_a_stage_that_fails_is_not_listed() -> None:
    log = RunLog(SilentProgress())
    with pytest.raises(ValueError, match="no"), log.record() as recorded, log.measure("export"):
        raise ValueError("no")
    assert log.timings == recorded.timings == []

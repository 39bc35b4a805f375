"""The thread that reads the weights: its result, its errors, and its end."""

import hashlib
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from sws_export.checkpoint import WeightShapes
from sws_export.errors import CheckpointError
from sws_export.files import HashedCopy
from sws_export.pipeline.run_log import RunLog
from sws_export.pipeline.source_check import SourceCheck
from sws_export.progress import Progress, SilentProgress
from sws_export.sources import Source
from tests.export_runs import RecordingProgress


class FakeSource:
    """A source whose weights are read until `finish` is set."""

    def __init__(self, file: Path, error: Exception | None = None) -> None:
        file.write_bytes(b"weights")
        self.files = (file,)
        self.finish = threading.Event()
        self.names_checked = 0
        self.error = error

    def check(self, progress: Progress, shapes: WeightShapes | None) -> WeightShapes | None:
        self.names_checked += 1
        progress.warn("a tensor has no place")
        return shapes

    def read_weights(self, progress: Progress, copy: HashedCopy | None = None) -> str:
        with progress.stage("check weights", 7) as stage:
            while not self.finish.wait(0.001):
                stage.advance(0)
            stage.advance(7)
        if copy is not None:
            copy.write(memoryview(b"weights"))
        if self.error is not None:
            raise self.error
        return "ab"

    def entry(self, sha256: str) -> Any:
        return {"sha256": sha256}


def check_of(source: FakeSource, log: RunLog | None = None) -> SourceCheck:
    return SourceCheck(cast(Source, source), log or RunLog(SilentProgress()))


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read weights"]


def test_weights_are_read_beside_the_caller(tmp_path: Path) -> None:
    source, log = FakeSource(tmp_path / "w"), RunLog(RecordingProgress(SilentProgress()))
    with check_of(source, log) as check:
        assert len(readers()) == 1
        source.finish.set()
        with log.record() as outer:
            check.check_names()
            assert check.description == {"sha256": "ab"}
        assert check.sha256 == "ab"
    assert source.names_checked == 1
    # Recorded by the check alone: results that are cached with it would repeat it.
    assert (outer.messages, outer.timings) == ([], [])
    assert check.recorded is not None
    assert check.recorded.messages == [(True, "a tensor has no place")]
    assert [timing.name for timing in check.recorded.timings] == ["check"]
    assert [timing.name for timing in log.timings] == ["check"]


def test_an_error_of_the_thread_is_raised_where_the_digest_is_needed(tmp_path: Path) -> None:
    source = FakeSource(tmp_path / "w", CheckpointError("contains NaN"))
    source.finish.set()
    with check_of(source) as check, pytest.raises(CheckpointError, match="contains NaN"):
        _ = check.description


def test_an_error_elsewhere_ends_the_thread(tmp_path: Path) -> None:
    source = FakeSource(tmp_path / "w")
    with pytest.raises(ZeroDivisionError), check_of(source):
        _ = len(readers()) // 0
    assert readers() == []


def test_an_interrupt_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FakeSource(tmp_path / "w")

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt), check_of(source) as check:
        _ = check.description
    assert readers() == []


def test_whole_files_are_copied_by_the_thread(tmp_path: Path) -> None:
    source = FakeSource(tmp_path / "w")
    source.finish.set()
    check = SourceCheck(cast(Source, source), RunLog(SilentProgress()), source.files)
    assert check.whole_files.copy is None
    check.copy_path = tmp_path / "copy"
    with check:
        copy = check.whole_files.copy
    assert copy is not None
    assert copy.path.read_bytes() == b"weights"
    assert (copy.size, copy.sha256.digest()) == (7, hashlib.sha256(b"weights").digest())


def test_nothing_is_read_before_it_is_needed(tmp_path: Path) -> None:
    source = FakeSource(tmp_path / "w")
    check_of(source)
    assert readers() == []

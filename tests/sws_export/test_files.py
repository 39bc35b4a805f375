"""Staged files and their publication: complete files or none, and errors of the destination."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sws_export.errors import OutputError
from sws_export.files import output_errors, publish, publish_together, staged_directory


def _refuse_with(code: int) -> Any:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


def _stage(out: Path, action: Callable[[Path], object]) -> None:
    """Write part of a file in a staged directory, then call `action` with it."""
    with staged_directory(out) as scratch:
        (scratch / "deep").mkdir()
        (scratch / "deep" / "part").write_bytes(b"half")
        action(scratch)


def _raise(error: BaseException) -> None:
    raise error


def test_the_staged_directory_is_beside_the_output_and_removed(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "a.plan") as scratch:
        assert scratch.is_dir()
        assert scratch.parent == tmp_path
        (scratch / "part").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit, FileNotFoundError])
def test_an_exception_leaves_the_old_file_only(tmp_path: Path, failure: type[BaseException]) -> None:
    out = tmp_path / "a.plan"
    out.write_bytes(b"old")
    with pytest.raises(failure):
        _stage(out, lambda _: _raise(failure()))
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == b"old"


def test_other_errors_are_not_changed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_directory(tmp_path / "a.plan"):
        (tmp_path / "some other file").read_bytes()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_while_writing(tmp_path: Path, code: int) -> None:
    out = tmp_path / "a.plan"
    expected = f"cannot write {out}: the disk is full .* GB free in .*; free some space"
    with pytest.raises(OutputError, match=expected):
        _stage(out, _refuse_with(code))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the disk is full"), staged_directory(tmp_path / "a.plan"):
        Path("/dev/full").write_bytes(b"x")


@pytest.mark.parametrize("place", ["missing/a.plan", "file/a.plan"])
def test_a_path_that_is_not_a_directory_is_an_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    expected = r"cannot write .*a\.plan: .*choose an --out in a directory"
    with pytest.raises(OutputError, match=expected), staged_directory(tmp_path / place):
        pytest.fail("there is nothing to write to")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"), staged_directory(tmp_path / "a.plan"):
        pytest.fail("there is nothing to write to")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_directory_that_cannot_be_created_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", _refuse_with(code))
    with pytest.raises(OutputError, match=os.strerror(code)), staged_directory(tmp_path / "a.plan"):
        pytest.fail("there is nothing to write to")


def test_publishing_replaces_files(tmp_path: Path) -> None:
    out = tmp_path / "a.plan"
    out.write_bytes(b"old")
    with out.open("rb") as reader, staged_directory(out) as scratch:
        (scratch / "new").write_bytes(b"new")
        publish(scratch / "new", out)
        assert out.read_bytes() == b"new"
        assert reader.read() == b"old", "who has the old file open keeps it"
    assert list(tmp_path.iterdir()) == [out]


def test_obsolete_files_are_removed_after_the_moves(tmp_path: Path) -> None:
    """As the weights of a large graph that a small graph replaces."""
    graph, weights = tmp_path / "g.onnx", tmp_path / "g.onnx.data"
    graph.write_bytes(b"large")
    weights.write_bytes(b"weights")
    staged = tmp_path / "staged"
    staged.write_bytes(b"small")
    publish_together({staged: graph}, [weights])
    assert list(tmp_path.iterdir()) == [graph]
    assert graph.read_bytes() == b"small"


def test_files_are_flushed_before_they_are_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, staged = tmp_path / "a.plan", tmp_path / "staged"
    staged.write_bytes(b"new")
    seen: list[tuple[str, bool]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        seen.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, out.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    publish(staged, out)
    assert seen == [("staged", False), (tmp_path.name, True)]


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_during_publishing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    out = tmp_path / "a.plan"
    out.write_bytes(b"old")
    monkeypatch.setattr(call, _refuse_with(errno.ENOSPC))
    with pytest.raises(OutputError, match="the disk is full"):
        _stage(out, lambda scratch: publish(scratch / "deep" / "part", out))
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_directory_at_the_destination_is_an_error(tmp_path: Path) -> None:
    out = tmp_path / "a.plan"
    out.mkdir()
    staged = tmp_path / "staged"
    staged.write_bytes(b"new")
    with pytest.raises(OutputError, match=r"a\.plan: Is a directory"):
        publish(staged, out)
    assert out.is_dir()


def test_an_unexpected_error_is_not_changed(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as failure, output_errors(tmp_path / "a"):
        _refuse_with(errno.EIO)()
    assert not isinstance(failure.value, OutputError)


@pytest.mark.skipif(sys.platform == "win32", reason="directories cannot be locked")
def test_scratch_of_a_killed_process_is_removed_by_the_next(tmp_path: Path) -> None:
    """Not that of a process that lives, nor what looks like it and is no directory."""
    program = (
        "import pathlib, sys, time\n"
        "from sws_export.files import staged_directory\n"
        "with staged_directory(pathlib.Path(sys.argv[1])) as scratch:\n"
        "    (scratch / 'half').write_text('x')\n"
        "    print(scratch.name, flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.plan")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        scratch = tmp_path / process.stdout.readline().strip()
        (tmp_path / ".sws-export-link").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").mkdir()
        with staged_directory(tmp_path / "b.plan") as own:
            assert {scratch.name, own.name} <= {path.name for path in tmp_path.iterdir()}
        assert (scratch / "half").is_file()
        process.kill()
    with staged_directory(tmp_path / "b.plan"):
        assert not scratch.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".sws-export-link", "elsewhere"]


def test_names_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    out = tmp_path / ("a" * 250 + ".plan")
    with staged_directory(out) as scratch:
        (scratch / out.name).write_bytes(b"x")
        publish(scratch / out.name, out)
    assert out.read_bytes() == b"x"
    longer = tmp_path / ("a" * 300)
    (tmp_path / "x").touch()
    with pytest.raises(OutputError, match="File name too long"):
        publish(tmp_path / "x", longer)

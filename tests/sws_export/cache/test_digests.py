"""A digest is recalled for a file that has certainly not changed."""

import os
import time
from pathlib import Path

import pytest

from sws_export.cache.digests import DigestCache, file_stamps

SHA256 = "ab" * 32


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as old."""
    monkeypatch.setattr("sws_export.cache.digests.RECENT_SECONDS", -1.0)
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def digests(tmp_path: Path) -> DigestCache:
    return DigestCache(tmp_path / "digests")


def remember(digests: DigestCache, *files: Path) -> None:
    digests.put(files, *file_stamps(files), SHA256)


def test_an_unchanged_file_is_recalled(digests: DigestCache, file: Path) -> None:
    assert digests.get([file]) is None
    remember(digests, file)
    assert digests.get([file]) == SHA256
    assert DigestCache(None).get([file]) is None


def test_several_files_count_together(digests: DigestCache, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"more")
    remember(digests, file, other)
    assert digests.get([file, other]) == SHA256
    assert digests.get([file]) is None


def test_times_that_were_set_back_do_not_deceive(digests: DigestCache, file: Path) -> None:
    """The same size, and the same mtime as after `cp -p` or `touch -r`: ctime tells."""
    remember(digests, file)
    before = file.stat()
    time.sleep(0.02)
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )
    assert digests.get([file]) is None


def test_another_file_in_its_place_is_not_it(digests: DigestCache, file: Path, tmp_path: Path) -> None:
    remember(digests, file)
    other = tmp_path / "new"
    other.write_bytes(b"weights")
    other.replace(file)
    assert digests.get([file]) is None


def test_a_file_that_changed_while_it_was_hashed_is_not_remembered(digests: DigestCache, file: Path) -> None:
    before = file_stamps([file])
    time.sleep(0.02)
    file.write_bytes(b"longer weights")
    digests.put([file], *before, SHA256)
    assert digests.get([file]) is None


def test_a_file_written_just_now_is_not_remembered(
    digests: DigestCache, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sws_export.cache.digests.RECENT_SECONDS", 2.0)
    remember(digests, file)
    assert digests.get([file]) is None


def test_a_damaged_memory_is_none(digests: DigestCache, file: Path, tmp_path: Path) -> None:
    remember(digests, file)
    (memory,) = (tmp_path / "digests").iterdir()
    memory.write_text("{")
    assert digests.get([file]) is None


def test_what_was_forgotten_is_not_recalled(digests: DigestCache, file: Path) -> None:
    remember(digests, file)
    digests.evict([file])
    assert digests.get([file]) is None

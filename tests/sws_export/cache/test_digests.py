"""Remembered digests: returned only for files that cannot have changed."""

import os
import time
from pathlib import Path

import pytest

from sws_export.cache.digests import DigestCache, file_stamps

SHA256 = "ab" * 32


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def digests(tmp_path: Path) -> DigestCache:
    return DigestCache(tmp_path / "digests")


def remember(digests: DigestCache, *files: Path, age: float = 10.0) -> None:
    """Store a digest as if `files` had been written `age` seconds before."""
    stamps, now = file_stamps(files)
    digests.put(files, stamps, now + age, SHA256)


def test_an_unchanged_file_is_a_hit(digests: DigestCache, file: Path) -> None:
    assert digests.get([file]) is None
    remember(digests, file)
    assert digests.get([file]) == SHA256
    assert DigestCache(None).get([file]) is None


def test_several_files_are_one_entry(digests: DigestCache, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"more")
    remember(digests, file, other)
    assert digests.get([file, other]) == SHA256
    assert digests.get([file]) is None


def test_a_restored_mtime_is_a_miss(digests: DigestCache, file: Path) -> None:
    """Same size and mtime, as after `cp -p` or `touch -r`; ctime differs."""
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


def test_a_replaced_file_is_a_miss(digests: DigestCache, file: Path, tmp_path: Path) -> None:
    remember(digests, file)
    other = tmp_path / "new"
    other.write_bytes(b"weights")
    other.replace(file)
    assert digests.get([file]) is None


def test_a_file_changed_during_hashing_is_not_stored(digests: DigestCache, file: Path) -> None:
    stamps, now = file_stamps([file])
    time.sleep(0.02)
    file.write_bytes(b"longer weights")
    digests.put([file], stamps, now + 10, SHA256)
    assert digests.get([file]) is None


def test_a_recent_file_is_not_stored(digests: DigestCache, file: Path) -> None:
    remember(digests, file, age=1.0)
    assert digests.get([file]) is None


def test_a_damaged_entry_is_a_miss(digests: DigestCache, file: Path, tmp_path: Path) -> None:
    remember(digests, file)
    (memory,) = (tmp_path / "digests").iterdir()
    memory.write_text("{")
    assert digests.get([file]) is None


def test_an_evicted_digest_is_a_miss(digests: DigestCache, file: Path) -> None:
    remember(digests, file)
    digests.evict([file])
    assert digests.get([file]) is None

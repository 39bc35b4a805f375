"""Cache entries are complete or absent, also with several processes in the directory."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sws_export.cache.keys import cache_key, code_version
from sws_export.cache.settings import cache_directory, open_cache
from sws_export.cache.store import Cache
from sws_export.errors import OptionError
from sws_export.files import file_digest
from sws_export.progress import SilentProgress
from tests.export_runs import RecordingProgress

KEY = "a" * 64


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10_000)


def store(cache: Cache, key: str = KEY, size: int = 1000, progress: RecordingProgress | None = None) -> Path:
    """Store a file of `size` bytes; returns it."""
    assert cache.root is not None
    file = cache.root.parent / f"{key[:4]}.plan"
    file.unlink(missing_ok=True)
    file.write_bytes(key[:1].encode() * size)
    cache.put(
        "engine",
        key,
        {"number": 1.5},
        {file: file_digest(file)},
        progress or RecordingProgress(SilentProgress()),
    )
    return file


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.EXDEV, "another device")


def keys(cache: Cache) -> set[str]:
    return {entry.key for entry in cache.entries()}


def test_a_stored_entry_is_found_and_extracted(cache: Cache, tmp_path: Path) -> None:
    assert cache.get("engine", KEY) is None
    file = store(cache)
    entry = cache.get("engine", KEY)
    assert entry is not None
    assert (entry.kind, entry.key, entry.metadata, entry.size) == ("engine", KEY, {"number": 1.5}, 1000)
    assert cache.get("graph", KEY) is None
    assert cache.extract(entry, file.name, tmp_path / "taken")
    assert (tmp_path / "taken").read_bytes() == b"a" * 1000


def test_no_directory_or_size_0_disables_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWS_EXPORT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SWS_EXPORT_CACHE_SIZE", "0")
    for none in (open_cache(), open_cache(enabled=False)):
        assert none.root is None
        none.put("engine", KEY, {}, {}, SilentProgress())
        with none.lock("engine", KEY, SilentProgress()):
            assert none.get("engine", KEY) is None
        assert none.entries() == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("500", 500), ("500MB", 5 * 10**8), ("1.5 GB", 15 * 10**8), ("2tb", 2 * 10**12)]
)
def test_the_size_is_set_by_the_environment(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setenv("SWS_EXPORT_CACHE_SIZE", text)
    assert open_cache().limit == size


def test_a_malformed_size_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWS_EXPORT_CACHE_SIZE", "much")
    with pytest.raises(OptionError, match="SWS_EXPORT_CACHE_SIZE=much: expected a size such as 500MB"):
        open_cache()


def test_the_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SWS_EXPORT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "sws-export" / "results"
    monkeypatch.setenv("SWS_EXPORT_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_directory() == tmp_path / "mine"


# Damage


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, 10)


@pytest.mark.parametrize("damage", [flip_byte, cut, Path.unlink])
@pytest.mark.parametrize("name", ["entry.json", "aaaa.plan"])
def test_a_damaged_entry_is_removed(
    cache: Cache, tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    file = store(cache)
    entry = cache.get("engine", KEY)
    assert entry is not None
    damage(entry.directory / name)
    found = cache.get("engine", KEY)
    assert found is None or not cache.extract(found, file.name, tmp_path / "taken")
    assert not entry.directory.exists()
    assert not (tmp_path / "taken").exists()
    store(cache)
    assert cache.get("engine", KEY) is not None


def test_changed_metadata_is_damage(cache: Cache) -> None:
    store(cache)
    file = cache.entries()[0].directory / "entry.json"
    changed = json.loads(file.read_text())
    changed["content"]["metadata"]["number"] = 2.5
    file.write_text(json.dumps(changed))
    assert cache.get("engine", KEY) is None


# Sharing


@pytest.mark.parametrize("clone", [True, False])
def test_artefacts_never_share_a_file(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clone: bool
) -> None:
    if not clone:
        monkeypatch.setattr(fcntl, "ioctl", refuse)
    first = store(cache)
    entry = cache.get("engine", KEY)
    assert entry is not None
    second = tmp_path / "second"
    assert cache.extract(entry, first.name, second)
    second.write_bytes(b"other")
    assert first.read_bytes() == b"a" * 1000
    # A file that replaces the first artefact may be shared: there is still one artefact.
    third = tmp_path / "third"
    assert cache.extract(entry, first.name, third, replaces=first)
    third.replace(first)
    assert first.read_bytes() == b"a" * 1000


def test_damage_by_an_overwritten_artefact_is_found(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    file = store(cache)
    file.write_bytes(b"b" * 1000)
    entry = cache.get("engine", KEY)
    assert entry is not None
    assert not cache.extract(entry, file.name, tmp_path / "taken")


def test_another_file_system_gets_a_copy(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    monkeypatch.setattr(os, "link", refuse)
    file = store(cache)
    assert file.stat().st_nlink == 1
    entry = cache.get("engine", KEY)
    assert entry is not None
    assert cache.extract(entry, file.name, tmp_path / "taken")


def test_a_full_disk_is_a_warning(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    monkeypatch.setattr(os, "link", refuse)
    progress = RecordingProgress(SilentProgress())
    store(cache, progress=progress)
    assert progress.lines == [
        (True, f"the engine cannot be stored in the cache {cache.root}: No space left on device")
    ]
    assert list((cache.root or Path()).glob("entries/*")) == []


# Size


def test_the_least_recently_used_entry_is_evicted_first(cache: Cache) -> None:
    for number, key in enumerate("abc"):
        store(cache, key * 64, 3000)
        os.utime(cache.entries()[0].directory / "entry.json", (number + 1, number + 1))
    assert cache.get("engine", "a" * 64) is not None
    store(cache, "d" * 64, 3000)
    assert keys(cache) == {"a" * 64, "c" * 64, "d" * 64}


def test_an_entry_larger_than_the_cache_is_not_stored(cache: Cache) -> None:
    store(cache, "b" * 64)
    progress = RecordingProgress(SilentProgress())
    store(cache, size=10_001, progress=progress)
    assert keys(cache) == {"b" * 64}
    assert "the engine of 0.0 GB is not cached" in progress.lines[0][1]


def test_an_entry_in_use_may_be_removed(cache: Cache, tmp_path: Path) -> None:
    file = store(cache, size=9000)
    entry = cache.get("engine", KEY)
    assert entry is not None
    assert cache.extract(entry, file.name, tmp_path / "taken")
    store(cache, "b" * 64, 9000)
    assert keys(cache) == {"b" * 64}
    assert (tmp_path / "taken").read_bytes() == b"a" * 9000
    # A miss and no error, though it was found before.
    assert not cache.extract(entry, file.name, tmp_path / "again")


def test_clear_removes_everything(cache: Cache, tmp_path: Path) -> None:
    file = store(cache)
    with cache.lock("engine", KEY, SilentProgress()):
        pass
    assert cache.clear() == (1, 1000)
    assert cache.entries() == []
    assert file.read_bytes() == b"a" * 1000
    left = [path for path in (cache.root or tmp_path).rglob("*") if path.is_file()]
    assert [path.name for path in left] in ([], ["evict.lock"])


# Other processes


def _store_slowly(root: Path, started: Any) -> None:
    """Store an entry and block until the process is killed."""

    def wait(*_: Any, **__: Any) -> None:
        started.set()
        time.sleep(60)

    import sws_export.cache.store as module

    module.share_file = wait
    store(Cache(root, 10_000))


def test_a_process_killed_while_storing_leaves_no_entry(cache: Cache) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=_store_slowly, args=(cache.root, started))
    process.start()
    assert started.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    entries = (cache.root or Path()) / "entries"
    (left,) = entries.iterdir()
    assert cache.get("engine", KEY) is None
    assert cache.entries() == []
    # The partial entry is removed once no process can be writing it.
    store(cache)
    assert left.exists()
    os.utime(left, (1, 1))
    store(cache, "b" * 64)
    assert not left.exists()


def _make_once(root: Path, barrier: Any, results: Any) -> None:
    cache = Cache(root, 10_000)
    barrier.wait(60)
    with cache.lock("engine", KEY, SilentProgress()):
        if cache.get("engine", KEY) is None:
            results.put("made")
            time.sleep(0.5)
            store(cache)
        else:
            results.put("found")


def test_one_process_computes_while_the_other_waits(cache: Cache) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_make_once, args=(cache.root, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=100) for _ in processes) == ["found", "made"]
    for process in processes:
        process.join(60)


def test_storing_twice_keeps_one_entry(cache: Cache) -> None:
    store(cache)
    progress = RecordingProgress(SilentProgress())
    store(cache, progress=progress)
    assert progress.lines == []
    assert keys(cache) == {KEY}
    assert len(list((cache.root or Path()).glob("entries/*"))) == 1


# Keys


def test_keys_depend_on_values_and_not_on_their_order() -> None:
    assert cache_key({"a": 1, "b": [2.5, None]}) == cache_key({"b": [2.5, None], "a": 1})
    assert len({cache_key(parts) for parts in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"})}) == 4


def test_the_code_has_a_version() -> None:
    assert len(code_version()) == 64

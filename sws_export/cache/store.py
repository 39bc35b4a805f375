"""A bounded directory of results, safe for several processes at a time.

    entries/<kind>-<key>/entry.json   facts, and size and sha256 of each file; its time is the last use
    entries/<kind>-<key>/<file>
    digests/, locks/                  see digests.py and `Cache.lock`

An entry is written under another name and renamed when it is complete, and renamed before it is removed, so
that whoever finds one finds all of it. Files are linked or copied out: an entry that is removed takes nothing
from those who took from it.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import filelock

from sws_export.cache.digests import DigestCache
from sws_export.cache.sharing import share_file
from sws_export.progress import Progress

Kind = Literal["graph", "validation", "engine"]
KINDS: tuple[Kind, ...] = ("graph", "validation", "engine")

_ENTRY = "entry.json"
_UNFINISHED = ".unfinished-"
# What a process that was killed left behind is older than any process takes to fill an entry.
_LEFT_BEHIND_SECONDS = 3600
_UNUSED_LOCK_SECONDS = 7 * 24 * 3600


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and sha256 (hex) of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One result.

    Attributes:
        kind: What it is.
        key: What it was made of, as a sha256 in hex.
        metadata: What is known about it, as JSON values.
        files: Its files by name.
        directory: Where they lie, for as long as the entry is not removed.
        last_used: Seconds since 1970 of its last use.
    """

    kind: Kind
    key: str
    metadata: dict[str, Any]
    files: dict[str, FileDigest]
    directory: Path
    last_used: float

    @property
    def size(self) -> int:
        """Bytes of its files, those shared with an artefact included."""
        return sum(file.bytes for file in self.files.values())

    @property
    def label(self) -> str:
        """What it was made of, in a few words."""
        return str(self.metadata.get("label", ""))


class Cache:
    """Entries below `root`, at most `limit` bytes of them; one without `root` finds and keeps nothing."""

    def __init__(self, root: Path | None, limit: int) -> None:
        self.root = root
        self.limit = limit
        self.digests = DigestCache(root / "digests" if root else None)

    def get(self, kind: Kind, key: str) -> Entry | None:
        """The entry of `key`, whose turn to be removed it now is last; a damaged one is removed."""
        if self.root is None:
            return None
        directory = self._entries() / f"{kind}-{key}"
        entry = _read(directory)
        if entry is None:
            if directory.exists():
                self._remove(directory)
            return None
        with contextlib.suppress(OSError):
            os.utime(directory / _ENTRY)
        return entry

    def extract(self, entry: Entry, name: str, place: Path, replaces: Path | None = None) -> bool:
        """Put a file of `entry` at `place`; false, and nothing there, if it is gone or damaged.

        Two artefacts never share a hard link: whoever overwrites one of them would change the other.

        Args:
            entry: What was found.
            name: Which of its files.
            place: A new path, in a directory that exists.
            replaces: An artefact that will be replaced by the one at `place`.

        Raises:
            OSError: `place` cannot be written.
        """
        stored = entry.directory / name
        try:
            artefacts = stored.stat().st_nlink - 1
            if replaces is not None and replaces.exists() and replaces.samefile(stored):
                artefacts -= 1
            share_file(stored, place, link=artefacts == 0)
        except FileNotFoundError:
            place.unlink(missing_ok=True)
            return False
        if file_digest(place) != entry.files[name]:
            place.unlink()
            self.evict(entry)
            return False
        return True

    def put(
        self,
        kind: Kind,
        key: str,
        metadata: Mapping[str, Any],
        files: Mapping[Path, FileDigest],
        progress: Progress,
    ) -> None:
        """Keep a result, and remove what was not used for longest. An export never fails for it."""
        if self.root is None:
            return
        size = sum(file.bytes for file in files.values())
        if size > self.limit:
            progress.log(
                f"the {kind} of {size / 1e9:.1f} GB is not kept: the cache holds {self.limit / 1e9:.1f} GB"
            )
            return
        entries = self._entries()
        try:
            entries.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=entries))
            try:
                for file in files:
                    share_file(file, unfinished / file.name)
                (unfinished / _ENTRY).write_text(
                    _signed(
                        {
                            "metadata": metadata,
                            "files": {file.name: asdict(found) for file, found in files.items()},
                        }
                    ),
                    "utf-8",
                )
                _rename(unfinished, entries / f"{kind}-{key}")
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            self._shrink(self.limit, f"{kind}-{key}")
        except OSError as error:
            progress.warn(f"the {kind} is not kept in the cache {self.root}: {error.strerror}")

    @contextlib.contextmanager
    def lock(self, kind: Kind, key: str, progress: Progress) -> Iterator[None]:
        """Let one process at a time make the result of `key`; the others wait, and then find it."""
        if self.root is None:
            yield
            return
        locks = self.root / "locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(locks / f"{kind}-{key}.lock")
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                with progress.stage(f"wait: another process makes the same {kind}"):
                    lock.acquire()
        except OSError:
            # A cache that cannot be written is one that nobody fills.
            yield
            return
        try:
            yield
        finally:
            lock.release()

    def evict(self, entry: Entry) -> None:
        """Remove an entry."""
        self._remove(entry.directory)

    def entries(self) -> list[Entry]:
        """All entries, the one used last first."""
        if self.root is None or not self._entries().is_dir():
            return []
        found = (_read(directory) for directory in self._entries().glob("[!.]*"))
        return sorted((entry for entry in found if entry), key=lambda entry: -entry.last_used)

    def clear(self) -> tuple[int, int]:
        """Remove everything; returns how many entries and bytes that were."""
        found = self.entries()
        if self.root is not None:
            for directory in self._entries().glob("*"):
                self._remove(directory)
            shutil.rmtree(self.root / "digests", ignore_errors=True)
            self._remove_locks(0)
        return len(found), sum(entry.size for entry in found)

    def _entries(self) -> Path:
        assert self.root is not None
        return self.root / "entries"

    def _shrink(self, limit: int, keep: str) -> None:
        """Remove the entries used longest ago until `limit` is kept, and what killed processes left."""
        assert self.root is not None
        with filelock.FileLock(self.root / "shrink.lock"):
            total = 0
            for entry in self.entries():
                total += entry.size
                if total > limit and entry.directory.name != keep:
                    total -= entry.size
                    self._remove(entry.directory)
            for directory in self._entries().glob(".*"):
                with contextlib.suppress(OSError):
                    if time.time() - directory.stat().st_mtime > _LEFT_BEHIND_SECONDS:
                        shutil.rmtree(directory, ignore_errors=True)
            self._remove_locks(_UNUSED_LOCK_SECONDS)

    def _remove_locks(self, seconds: int) -> None:
        assert self.root is not None
        for lock in (self.root / "locks").glob("*.lock"):
            with contextlib.suppress(OSError):
                if time.time() - lock.stat().st_mtime >= seconds:
                    lock.unlink()

    def _remove(self, directory: Path) -> None:
        with contextlib.suppress(OSError):
            trash = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=directory.parent))
            directory.rename(trash / "removed")
            shutil.rmtree(trash, ignore_errors=True)


def _rename(unfinished: Path, place: Path) -> None:
    try:
        unfinished.rename(place)
    except OSError as error:
        # Another process may have stored the same result: either will do.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def file_digest(file: Path) -> FileDigest:
    """Size and sha256 of `file`."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileDigest(os.fstat(stream.fileno()).st_size, digest)


def _signed(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return json.dumps({"content": content, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def _read(directory: Path) -> Entry | None:
    """The entry in `directory`, or None if it is gone, incomplete or damaged."""
    file = directory / _ENTRY
    kind, _, key = directory.name.partition("-")
    try:
        signed = json.loads(file.read_text("utf-8"))
        content = signed["content"]
        if json.loads(_signed(content)) != signed or kind not in KINDS:
            return None
        files = {name: FileDigest(**facts) for name, facts in content["files"].items()}
        if any((directory / name).stat().st_size != facts.bytes for name, facts in files.items()):
            return None
        return Entry(kind, key, content["metadata"], files, directory, file.stat().st_mtime)
    except (OSError, ValueError, KeyError, TypeError):
        return None

"""A cache directory with a size limit, which several processes can use at the same time.

    entries/<kind>-<key>/entry.json   metadata, and size and sha256 of each file; its mtime is the last use
    entries/<kind>-<key>/<file>
    digests/, locks/                  see digests.py and `Cache.lock`

An entry is written under a temporary name and renamed when it is complete, and renamed before it is removed,
so that processes only see complete entries. Files are extracted as links or copies, so that they remain when
the entry is evicted.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import filelock
import msgspec
from msgspec import Meta

from sws_export.cache.digests import DigestCache
from sws_export.cache.sharing import share_file
from sws_export.documents import FileName, Sha256, check_document, parse_json, read_text
from sws_export.files import FileDigest, file_digest
from sws_export.progress import Progress

Kind = Literal["trace", "graph", "validation", "engine"]
KINDS: tuple[Kind, ...] = ("trace", "graph", "validation", "engine")

_ENTRY = "entry.json"
_UNFINISHED = ".unfinished-"
# An unfinished entry of this age was left by a killed process: no process takes that long to write one.
_ORPHAN_SECONDS = 3600
_UNUSED_LOCK_SECONDS = 7 * 24 * 3600


@dataclass(frozen=True)
class Entry:
    """One cached result.

    Attributes:
        kind: Kind of the result.
        key: Cache key, a sha256 in hex.
        metadata: JSON values stored with the result.
        files: Size and digest of each file by name.
        directory: Directory of the files, until the entry is evicted.
        last_used: Time of the last use, in seconds since the epoch.
    """

    kind: Kind
    key: str
    metadata: dict[str, Any]
    files: dict[str, FileDigest]
    directory: Path
    last_used: float

    @property
    def size(self) -> int:
        """Total size of the files in bytes, including blocks that are shared with an artefact."""
        return sum(file.bytes for file in self.files.values())

    @property
    def label(self) -> str:
        """Short description for `sws-export cache list`."""
        return str(self.metadata.get("label", ""))


class StoredContent(TypedDict):
    """What the checksum of an entry covers."""

    metadata: dict[str, Any]
    files: Annotated[dict[FileName, FileDigest], Meta(max_length=16)]


class StoredEntry(TypedDict):
    """The content of an `entry.json`."""

    content: StoredContent
    sha256: Sha256


class Cache:
    """Entries below `root` with at most `limit` bytes in total; without `root` the cache is always empty."""

    def __init__(self, root: Path | None, limit: int) -> None:
        self.root = root
        self.limit = limit
        self.digests = DigestCache(root / "digests" if root else None)

    def get(self, kind: Kind, key: str) -> Entry | None:
        """The entry of `key`, which becomes the most recently used one; a damaged entry is evicted."""
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

    def extract(self, entry: Entry, name: str, path: Path, replaces: Path | None = None) -> bool:
        """Write a file of `entry` to `path`.

        Two artefacts never share a hard link: a program that overwrites one would change the other.

        Args:
            entry: A result of `get`.
            name: Name of the file.
            path: A path that does not exist, in an existing directory.
            replaces: An artefact that will be replaced by `path`.

        Returns:
            False if the file is missing or damaged; nothing is written then.

        Raises:
            OSError: `path` cannot be written.
        """
        stored = entry.directory / name
        try:
            artefacts = stored.stat().st_nlink - 1
            if replaces is not None and replaces.exists() and replaces.samefile(stored):
                artefacts -= 1
            share_file(stored, path, link=artefacts == 0)
        except FileNotFoundError:
            path.unlink(missing_ok=True)
            return False
        if file_digest(path) != entry.files[name]:
            path.unlink()
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
        """Store a result and evict the least recently used ones. A failure is a warning, never an error."""
        if self.root is None:
            return
        size = sum(file.bytes for file in files.values())
        if size > self.limit:
            progress.log(
                f"the {kind} of {size / 1e9:.1f} GB is not cached: the limit is {self.limit / 1e9:.1f} GB"
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
                    _with_checksum(
                        {
                            "metadata": metadata,
                            "files": {file.name: asdict(digest) for file, digest in files.items()},
                        }
                    ),
                    "utf-8",
                )
                _rename(unfinished, entries / f"{kind}-{key}")
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            self._evict_to_limit(f"{kind}-{key}")
        except OSError as error:
            progress.warn(f"the {kind} cannot be stored in the cache {self.root}: {error.strerror}")

    @contextlib.contextmanager
    def lock(self, kind: Kind, key: str, progress: Progress) -> Iterator[None]:
        """Lock the result of `key`, so that one process computes it while others wait for it."""
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
                with progress.stage(f"wait for another process with the same {kind}"):
                    lock.acquire()
        except OSError:
            # Without write access there is nothing to lock: no process can store a result.
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
        """All entries, most recently used first."""
        if self.root is None or not self._entries().is_dir():
            return []
        found = (_read(directory) for directory in self._entries().glob("[!.]*"))
        return sorted((entry for entry in found if entry), key=lambda entry: -entry.last_used)

    def clear(self) -> tuple[int, int]:
        """Remove everything; returns the number and total size in bytes of the removed entries."""
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

    def _evict_to_limit(self, keep: str) -> None:
        """Evict the least recently used entries except `keep`, and remove orphans of killed processes."""
        assert self.root is not None
        with filelock.FileLock(self.root / "evict.lock"):
            total = 0
            for entry in self.entries():
                total += entry.size
                if total > self.limit and entry.directory.name != keep:
                    total -= entry.size
                    self._remove(entry.directory)
            for directory in self._entries().glob(".*"):
                with contextlib.suppress(OSError):
                    if time.time() - directory.stat().st_mtime > _ORPHAN_SECONDS:
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


def _rename(unfinished: Path, directory: Path) -> None:
    try:
        unfinished.rename(directory)
    except OSError:
        # Another process may have stored the same result in the meantime.
        if not directory.exists():
            raise


def _with_checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return json.dumps({"content": content, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def _read(directory: Path) -> Entry | None:
    """The entry in `directory`, or None if it is missing, incomplete or damaged."""
    file = directory / _ENTRY
    kind, _, key = directory.name.partition("-")
    try:
        stored = check_document(parse_json(read_text(file)), StoredEntry)
        content = stored["content"]
        if parse_json(_with_checksum(content)) != stored or kind not in KINDS:
            return None
        files = msgspec.convert(content["files"], dict[str, FileDigest])
        if any((directory / name).stat().st_size != digest.bytes for name, digest in files.items()):
            return None
        return Entry(kind, key, content["metadata"], files, directory, file.stat().st_mtime)
    except (OSError, ValueError):
        return None

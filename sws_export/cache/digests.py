"""Cache of the sha256 of files that have not changed; hashing a checkpoint takes a second for each GB.

As in git, a file is unchanged if its path, size, inode, device, mtime and ctime (in ns) are the same. ctime
cannot be set, so a file with a copied mtime (`cp -p`, `rsync -t`, `touch`) is detected as changed. The digest
of a file that was modified less than two seconds before it was hashed is not stored: with the coarse clock of
some file systems, a later modification could have the same time.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypedDict

from msgspec import Meta

from sws_export.cache.keys import cache_key
from sws_export.documents import Sha256, check_document, parse_json, read_text

RECENT_SECONDS = 2.0
"""Age below which a modification counts as recent, so that the digest is not stored."""

Stamps = list[dict[str, str | int]]


def file_stamps(files: Sequence[Path]) -> tuple[Stamps, float]:
    """Size, inode and times of `files`, and the current time in seconds since the epoch.

    Raises:
        OSError: A file does not exist.
    """
    found: Stamps = []
    for file in files:
        status = file.stat()
        found.append(
            {
                "path": str(file.resolve()),
                "size": status.st_size,
                "inode": status.st_ino,
                "device": status.st_dev,
                "mtime_ns": status.st_mtime_ns,
                "ctime_ns": status.st_ctime_ns,
            }
        )
    return found, time.time()


class StoredDigest(TypedDict):
    """The content of a file below `digests/`."""

    files: Annotated[Stamps, Meta(max_length=10_000)]
    sha256: Sha256


class DigestCache:
    """Digests of sets of files, each in a JSON file below `root`; nothing is stored without `root`."""

    def __init__(self, root: Path | None) -> None:
        self._root = root

    def get(self, files: Sequence[Path]) -> str | None:
        """The stored digest of `files`, or None if there is none or the files have changed."""
        if self._root is None:
            return None
        try:
            stored = check_document(parse_json(read_text(self._path(files))), StoredDigest)
            return stored["sha256"] if stored["files"] == file_stamps(files)[0] else None
        except (OSError, ValueError):
            return None

    def put(self, files: Sequence[Path], before: Stamps, began: float, sha256: str) -> None:
        """Store the digest of `files`, unless they changed while or shortly before they were hashed.

        Args:
            files: The hashed files.
            before: `file_stamps` of the files before they were hashed.
            began: Time of `before`.
            sha256: The digest, in hex.
        """
        if self._root is None or before != file_stamps(files)[0]:
            return
        changed = max(int(stamp[name]) for stamp in before for name in ("mtime_ns", "ctime_ns"))
        if changed / 1e9 > began - RECENT_SECONDS:
            return
        with contextlib.suppress(OSError):
            self._root.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._root)
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                json.dump({"files": before, "sha256": sha256}, stream)
            Path(name).replace(self._path(files))

    def evict(self, files: Sequence[Path]) -> None:
        """Remove the digest of `files`."""
        if self._root is not None:
            with contextlib.suppress(OSError):
                self._path(files).unlink()

    def _path(self, files: Sequence[Path]) -> Path:
        assert self._root is not None
        return self._root / f"{cache_key({'files': [str(file.resolve()) for file in files]})}.json"

"""Remembers the sha256 of files that have not changed, as git does: a checkpoint takes a second a GB.

A file counts as unchanged while its path, size, inode, and the times of its last change (mtime and ctime, to
the nanosecond) are the same. No program can set ctime back, so that copying times (`cp -p`, `rsync -t`,
`touch`) does not pass for unchanged. What was changed within two seconds before it was hashed is not
remembered: file systems whose clocks are coarse could not tell a later change from that one.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sws_export.cache.keys import cache_key

RECENT_SECONDS = 2.0

Stamps = list[dict[str, str | int]]


def file_stamps(files: Sequence[Path]) -> tuple[Stamps, float]:
    """What tells one state of `files` from another, without reading them; and the time (since 1970)."""
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


class DigestCache:
    """sha256 of files, one JSON file each below `root`; without `root` it remembers nothing."""

    def __init__(self, root: Path | None) -> None:
        self._root = root

    def get(self, files: Sequence[Path]) -> str | None:
        """The digest of `files` as it was remembered, if they have not changed since."""
        if self._root is None:
            return None
        try:
            known = json.loads(self._place(files).read_text("utf-8"))
            return str(known["sha256"]) if known["files"] == file_stamps(files)[0] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, files: Sequence[Path], before: Stamps, began: float, sha256: str) -> None:
        """Remember the digest of `files`.

        Args:
            files: What was hashed.
            before: Their stamps before they were hashed.
            began: When these were taken.
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
            Path(name).replace(self._place(files))

    def evict(self, files: Sequence[Path]) -> None:
        """Have `files` hashed again."""
        if self._root is not None:
            with contextlib.suppress(OSError):
                self._place(files).unlink()

    def _place(self, files: Sequence[Path]) -> Path:
        assert self._root is not None
        return self._root / f"{cache_key({'files': [str(file.resolve()) for file in files]})}.json"

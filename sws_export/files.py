"""Output files that are written completely or not at all."""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TypeVar

from sws_export.errors import OutputError

AnyPath = TypeVar("AnyPath", bound=PurePath)

ENGINE_SUFFIXES = (".plan", ".engine")
"""File name suffixes of engines."""

_ACCESS_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)
# Not the name of the artefact: with it the name of the directory could be too long.
_SCRATCH_PREFIX = ".sws-export-"


@dataclasses.dataclass(frozen=True)
class FileDigest:
    """Size in bytes and sha256 (hex) of a file."""

    bytes: int
    sha256: str


def file_digest(file: Path) -> FileDigest:
    """Size and sha256 of `file`."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileDigest(os.fstat(stream.fileno()).st_size, digest)


def file_places(files: Sequence[Path]) -> dict[Path, int]:
    """Where each of `files` begins in their concatenation, in bytes."""
    sizes = [file.stat().st_size for file in files]
    return dict(zip(files, itertools.accumulate(sizes, initial=0), strict=False))


class HashedCopy:
    """A new file whose bytes are hashed while they are written.

    Attributes:
        path: The file.
        sha256: The hash of what was written.
        size: Bytes written.
    """

    def __init__(self, path: Path) -> None:
        """Create the file."""
        self.path = path
        self.sha256 = hashlib.sha256()
        self.size = 0
        self._file = path.open("wb")

    def write(self, chunk: memoryview) -> None:
        """Append bytes."""
        self.sha256.update(chunk)
        self._file.write(chunk)
        self.size += len(chunk)

    def flush(self) -> None:
        """Wait until all bytes are on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def external_data_path(path: Path) -> Path:
    """Path of the external data of the ONNX file `path`."""
    return path.with_name(path.name + ".data")


def stays_below(location: PurePath) -> bool:
    """Whether a path that is joined to a directory is below it, before links are followed.

    On Windows a path with a drive or a root of its own is not, even if it is not absolute: `D:x`, `/x`.
    """
    return not location.anchor and ".." not in location.parts


def common_directory(files: Sequence[AnyPath]) -> AnyPath | None:
    """The innermost directory that contains all `files`, which are absolute; None if their drives differ."""
    first, *others = files
    return next((path for path in first.parents if all(path in file.parents for file in others)), None)


def user_cache() -> Path:
    """The folder for caches of this package, in the cache directory of the user."""
    windows = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None
    base = os.environ.get("XDG_CACHE_HOME") or windows or str(Path("~/.cache").expanduser())
    return Path(base) / "sws-export"


@contextlib.contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """A scratch directory beside `out`, on the same file system, which is removed when the block ends.

    All intermediate files are written there, so that nothing remains after an error, a full disk or an
    interrupt. What killed processes have left there is removed first: a scratch directory is locked while its
    process lives.

    Raises:
        OutputError: The directory of `out` does not exist or is not writable, or the disk is full.
    """
    with output_errors(out):
        _remove_orphans(out.parent)
        scratch, lock = _locked_scratch(out.parent)
    try:
        yield scratch
    except OSError as error:
        _raise_if_full(out, error)
        raise
    finally:
        # A second Ctrl-C must not interrupt the removal.
        with _uninterrupted():
            shutil.rmtree(scratch, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def _remove_orphans(directory: Path) -> None:
    """Remove the scratch directories that no process has locked."""
    for scratch in directory.glob(f"{_SCRATCH_PREFIX}*"):
        lock = _lock(scratch, wait=False)
        if lock is not None:
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(lock)


def _locked_scratch(directory: Path) -> tuple[Path, int | None]:
    """A new scratch directory and its lock; None where the file system has no locks."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH_PREFIX, dir=directory))
        lock = _lock(scratch, wait=True)
        # Before it was locked, another process may have removed it as an orphan.
        if scratch.exists():
            return scratch, lock
        if lock is not None:
            os.close(lock)


def _lock(directory: Path, *, wait: bool) -> int | None:
    """The descriptor of a locked directory, which is unlocked when it is closed or the process ends.

    None if another process has locked it, or it cannot be locked: on Windows, and on some network file
    systems, where orphans are therefore not removed.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def publish(staged: Path, out: Path) -> None:
    """Flush `staged` to disk and move it to `out` atomically, replacing an existing file.

    Raises:
        OutputError: The file cannot be moved, or the disk is full.
    """
    publish_together({staged: out})


def publish_together(targets: Mapping[Path, Path], obsolete: Sequence[Path] = ()) -> None:
    """Move staged files to their final paths in one directory, replacing existing files.

    All files are flushed to disk first. During the moves interrupts are ignored, so that related files are
    replaced together.

    Args:
        targets: Final path of each staged file, in the order of the moves.
        obsolete: Files to remove afterwards, if they exist.

    Raises:
        OutputError: A file cannot be moved, or the disk is full.
    """
    last = list(targets.values())[-1]
    with output_errors(last):
        for staged in targets:
            _flush(staged)
        with _uninterrupted():
            for staged, target in targets.items():
                staged.replace(target)
            for file in obsolete:
                file.unlink(missing_ok=True)
        _flush(last.parent)


def _flush(path: Path) -> None:
    """Write a file or the entries of a directory to disk."""
    windows = sys.platform == "win32"
    if windows and path.is_dir():
        # Windows cannot flush directories, and flushes files that are open for writing only.
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM while files are moved or removed."""
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread receives signals.
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def output_errors(out: Path) -> Iterator[None]:
    """Convert OS errors from writing to the directory of `out` to `OutputError`."""
    try:
        yield
    except OSError as error:
        _raise_if_full(out, error)
        if error.errno in _ACCESS_ERRORS:
            # Windows does not replace a file that a program has open or mapped.
            in_use = "close programs that use this file, or " if sys.platform == "win32" else ""
            raise OutputError(
                f"cannot write {out}: {error.strerror}; {in_use}choose an --out in a directory that exists "
                "and is writable"
            ) from error
        raise


def _raise_if_full(out: Path, error: OSError) -> None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(out.parent).free
        raise OutputError(
            f"cannot write {out}: the disk is full ({free / 1e9:.2f} GB free in {out.parent}); "
            "free some space or choose another --out"
        ) from error
    if error.errno == errno.EFBIG:
        raise OutputError(
            f"cannot write {out}: the file is larger than the file system of {out.parent} (4 GB on FAT32) or "
            "this shell (ulimit -f) allows; choose another --out"
        ) from error

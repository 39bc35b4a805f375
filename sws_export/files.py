"""Files that are either complete or not there."""

import contextlib
import errno
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sws_export.errors import OutputError

ENGINE_SUFFIXES = (".plan", ".engine")
"""File name suffixes of engines."""

_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


@contextlib.contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """A scratch directory beside `out`, on the same filesystem, removed at the end whatever happens.

    Everything on the way to `out` is written there, so that an error, a full disk or an interrupt leaves
    nothing behind.

    Raises:
        OutputError: The directory of `out` is missing or not writable, or the disk is full.
    """
    with output_errors(out):
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield scratch
    except OSError as error:
        _raise_if_full(out, error)
        raise
    finally:
        # Whoever presses Ctrl-C twice wants no remains either.
        with _uninterrupted():
            shutil.rmtree(scratch, ignore_errors=True)


def publish(staged: Path, out: Path) -> None:
    """Make `staged` durable and move it to `out` in one step, replacing what was there.

    Raises:
        OutputError: The move is refused or the disk is full.
    """
    publish_together({staged: out})


def publish_together(places: Mapping[Path, Path], obsolete: Sequence[Path] = ()) -> None:
    """Move staged files to their places in one directory, in the order given, replacing what was there.

    Files that are `obsolete` by then are removed, if they exist.

    What takes long or may fail comes first; an interrupt then waits until the last file has moved, so that
    no artefact appears without those that belong to it.

    Raises:
        OutputError: A move is refused or the disk is full.
    """
    last = list(places.values())[-1]
    with output_errors(last):
        for staged in places:
            _flush(staged)
        with _uninterrupted():
            for staged, place in places.items():
                staged.replace(place)
            for file in obsolete:
                file.unlink(missing_ok=True)
        _flush(last.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C and the request to end for the moment it takes to move or remove files."""
    if threading.current_thread() is not threading.main_thread():
        # Signals are for the main thread alone.
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
    """Turn the operating system's refusals to write near `out` into an `OutputError`."""
    try:
        yield
    except OSError as error:
        _raise_if_full(out, error)
        if error.errno in _REFUSALS:
            raise OutputError(
                f"cannot write {out}: {error.strerror}; choose an --out in a directory that exists and is "
                "writable"
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
            f"cannot write {out}: the file is larger than the filesystem of {out.parent} (4 GB on FAT32) or "
            "the limit of this shell (ulimit -f) allows; choose another --out"
        ) from error

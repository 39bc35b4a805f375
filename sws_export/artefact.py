"""Files that are either complete or not there."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sws_export.errors import OutputError

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
        shutil.rmtree(scratch, ignore_errors=True)


def publish(staged: Path, out: Path) -> None:
    """Make `staged` durable and move it to `out` in one step, replacing what was there.

    Raises:
        OutputError: The move is refused or the disk is full.
    """
    with output_errors(out):
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        staged.replace(out)
        directory = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


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

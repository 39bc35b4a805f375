"""Copies of files that share disk blocks where the file system supports it."""

import errno
import os
import shutil
import sys
from pathlib import Path

_FICLONE = 0x40049409
"""ioctl of Linux: clone a file copy-on-write (btrfs, XFS, bcachefs)."""


def share_file(source: Path, target: Path, *, link: bool = True) -> None:
    """Create `target` with the content of `source`: a copy-on-write clone, else a hard link, else a copy.

    Args:
        source: An existing file.
        target: A path that does not exist.
        link: Whether a hard link is allowed.

    Raises:
        OSError: `source` does not exist, or `target` cannot be written, for example because the disk is full.
    """
    if _clone(source, target):
        return
    if link:
        try:
            os.link(source, target)
        except FileNotFoundError:
            raise
        except OSError:
            pass  # another file system, or no support for hard links
        else:
            return
    free = shutil.disk_usage(target.parent).free
    if source.stat().st_size > free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    shutil.copyfile(source, target)


def _clone(source: Path, target: Path) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    with source.open("rb") as reading, target.open("xb") as writing:
        try:
            fcntl.ioctl(writing.fileno(), _FICLONE, reading.fileno())
        except OSError:
            target.unlink()
            return False
    return True

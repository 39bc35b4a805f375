"""A second name for a file, or a copy of it, with as little work and disk as the file system allows."""

import errno
import fcntl
import os
import shutil
import sys
from pathlib import Path

_FICLONE = 0x40049409
"""ioctl of Linux: let a file share the blocks of another until either is changed (btrfs, XFS, bcachefs)."""


def share_file(source: Path, target: Path, *, link: bool = True) -> None:
    """Make `target`, which must not exist, hold what `source` holds.

    Blocks are shared copy-on-write where the file system can; else `target` becomes a hard link, where that
    is allowed and possible; else a copy.

    Raises:
        OSError: `source` is gone, or `target` cannot be written, for example because the disk is full.
    """
    if _clone(source, target):
        return
    if link:
        try:
            os.link(source, target)
        except FileNotFoundError:
            raise
        except OSError:
            pass  # another file system, or one without hard links
        else:
            return
    free = shutil.disk_usage(target.parent).free
    if source.stat().st_size > free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    shutil.copyfile(source, target)


def _clone(source: Path, target: Path) -> bool:
    if sys.platform != "linux":
        return False
    with source.open("rb") as reading, target.open("xb") as writing:
        try:
            fcntl.ioctl(writing.fileno(), _FICLONE, reading.fileno())
        except OSError:
            target.unlink()
            return False
    return True

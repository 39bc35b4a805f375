"""Whether a plugin library may be loaded: its owner, who can replace it, and its sha256.

Loading a library runs its code with the rights of this process.
"""

import base64
import hashlib
import importlib.metadata
import os
import stat
import sys
from pathlib import Path

from sws_export.documents import open_regular
from sws_export.errors import PluginError

_REBUILD = "build it again with `sws-export plugins build --force`"


def digest_file(library: Path) -> Path:
    """The file beside a library with its sha256, which `sws-export plugins build` writes."""
    return library.with_name(f"{library.name}.sha256")


def library_digest(library: Path) -> str:
    """The sha256 of a library, in hex."""
    with open_regular(library) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_library(library: Path) -> None:
    """Check that only this user or root can have written the library, and that it is what was built.

    Raises:
        PluginError: Another user owns the library or a directory above it, or can write there; or its sha256
            was not recorded or is another one.
    """
    real = library.resolve()
    for path in (real, *real.parents):
        _check_owner(library, path)
    expected = _recorded_digest(real)
    if expected is None:
        raise PluginError(
            f"{library} is not loaded: neither {digest_file(real).name} nor the installed package records "
            f"its sha256; {_REBUILD}"
        )
    try:
        found = library_digest(real)
    except OSError as error:
        raise PluginError(f"cannot read {library}: {error.strerror}") from error
    if found != expected:
        raise PluginError(
            f"{library} is not loaded: its sha256 is {found[:12]}…, {expected[:12]}… was recorded when it "
            f"was built; {_REBUILD}"
        )


def _check_owner(library: Path, path: Path) -> None:
    if sys.platform == "win32":
        # Plugins are built and used on Linux only.
        return
    try:
        status = path.stat()
    except OSError as error:
        raise PluginError(f"cannot read {path}: {error.strerror}") from error
    # In a directory with the sticky bit, such as /tmp, others cannot rename or remove what this user owns.
    sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    others = stat.S_IWOTH | (stat.S_IWGRP if status.st_gid not in (0, os.getegid()) else 0)
    problem = ""
    if status.st_uid not in (0, os.geteuid()):
        problem = f"{path} belongs to another user"
    elif status.st_mode & others and not sticky:
        problem = f"other users can write to {path}"
    if problem:
        raise PluginError(
            f"{library} is not loaded, because {problem}: build it in a folder of your own with "
            "`sws-export plugins build`, or change the permissions"
        )


def _recorded_digest(library: Path) -> str | None:
    """The sha256 beside the library, or that of a library installed with the package, from its RECORD."""
    try:
        return digest_file(library).read_text("ascii").strip()
    except (OSError, ValueError):
        pass
    try:
        files = importlib.metadata.files("sws-export") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        recorded = file.hash if file.name == library.name else None
        if recorded is not None and Path(str(file.locate())).resolve() == library:
            padding = "=" * (-len(recorded.value) % 4)
            return base64.urlsafe_b64decode(recorded.value + padding).hex()
    return None

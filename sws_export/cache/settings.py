"""Where the cache lies and how large it may become."""

import os
import re
from pathlib import Path

from sws_export.cache.store import Cache
from sws_export.errors import OptionError

DIRECTORY_VARIABLE = "SWS_EXPORT_CACHE_DIR"
SIZE_VARIABLE = "SWS_EXPORT_CACHE_SIZE"
DEFAULT_SIZE = "20GB"

_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def cache_directory() -> Path:
    """The directory in `SWS_EXPORT_CACHE_DIR`, else one in the user's cache."""
    if chosen := os.environ.get(DIRECTORY_VARIABLE):
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(base) / "sws-export" / "results"


def open_cache(*, enabled: bool = True) -> Cache:
    """The user's cache; one that keeps nothing where it is not `enabled` or may have no size.

    Raises:
        OptionError: `SWS_EXPORT_CACHE_SIZE` is no size.
    """
    limit = _parse_size(os.environ.get(SIZE_VARIABLE) or DEFAULT_SIZE)
    return Cache(cache_directory() if enabled and limit else None, limit)


def _parse_size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT]B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise OptionError(
            f"{SIZE_VARIABLE}={text}: expected a size such as 500MB or {DEFAULT_SIZE}, or 0 for no cache"
        )
    return int(float(found[1]) * _UNITS[(found[2] or "").upper()])

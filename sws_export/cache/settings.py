"""Directory and size limit of the cache."""

import os
import re
from pathlib import Path

from sws_export.cache.store import Cache
from sws_export.errors import OptionError
from sws_export.files import user_cache

DIRECTORY_VARIABLE = "SWS_EXPORT_CACHE_DIR"
SIZE_VARIABLE = "SWS_EXPORT_CACHE_SIZE"
DEFAULT_SIZE = "20GB"

_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def cache_directory() -> Path:
    """The directory from `SWS_EXPORT_CACHE_DIR`, otherwise one in the cache directory of the user."""
    if chosen := os.environ.get(DIRECTORY_VARIABLE):
        return Path(chosen).absolute()
    return user_cache() / "results"


def open_cache(*, enabled: bool = True) -> Cache:
    """The cache of the user.

    Args:
        enabled: If False, or if `SWS_EXPORT_CACHE_SIZE` is 0, the cache stores nothing.

    Raises:
        OptionError: `SWS_EXPORT_CACHE_SIZE` is not a size.
    """
    limit = _parse_size(os.environ.get(SIZE_VARIABLE) or DEFAULT_SIZE)
    return Cache(cache_directory() if enabled and limit else None, limit)


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT]B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise OptionError(
            f"{SIZE_VARIABLE}={text}: expected a size such as 500MB or {DEFAULT_SIZE}; 0 disables the cache"
        )
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])

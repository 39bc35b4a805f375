"""Directory and size limit of the cache."""

import os
from pathlib import Path

from sws_export.byte_sizes import parse_bytes
from sws_export.cache.store import Cache
from sws_export.files import user_cache

DIRECTORY_VARIABLE = "SWS_EXPORT_CACHE_DIR"
SIZE_VARIABLE = "SWS_EXPORT_CACHE_SIZE"
DEFAULT_SIZE = "20GB"


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
    size = os.environ.get(SIZE_VARIABLE) or DEFAULT_SIZE
    limit = parse_bytes(size, f"{SIZE_VARIABLE}={size}")
    return Cache(cache_directory() if enabled and limit else None, limit)

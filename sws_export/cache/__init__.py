"""Cache of the results of earlier runs, with content hashes as keys."""

from sws_export.cache.keys import cache_key, code_version
from sws_export.cache.settings import cache_directory, open_cache
from sws_export.cache.store import Cache, Entry

__all__ = [
    "Cache",
    "Entry",
    "cache_directory",
    "cache_key",
    "code_version",
    "open_cache",
]

"""Keys of cache entries."""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cache_key(values: Mapping[str, Any]) -> str:
    """The sha256, in hex, of JSON values; the order of the keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@functools.cache
def code_version() -> str:
    """The sha256, in hex, of the Python sources of sws-export.

    The version number is not enough: during development the code changes while the version stays the same.
    """
    import graph_passes
    import sws_export

    digest = hashlib.sha256()
    for package in (sws_export, graph_passes):
        root = Path(str(package.__file__)).parent
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{package.__name__}/{file.relative_to(root).as_posix()}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()

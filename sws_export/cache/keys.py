"""What the name of a cache entry is made of."""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cache_key(parts: Mapping[str, Any]) -> str:
    """The sha256, in hex, of values that JSON can hold; their order does not count."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@functools.cache
def code_version() -> str:
    """The sha256, in hex, of this software's own sources.

    A version number stays while the code is worked on; results of other code must not be taken for ours.
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

"""Reads the header of a serialized engine (a plan), which needs no driver.

NVIDIA does not document the layout, except for bytes 24 to 27 (NVIDIA/TensorRT issue 3073); the rest was
found in plans of TensorRT for RTX 1.7. It identifies the file type and detects truncation. Whether a plan can
be loaded is the runtime's decision.

    0   4 bytes   magic: "vtrt" TensorRT for RTX, "ftrt" or "ptrt" TensorRT
    16  u64       size of the whole file in bytes
    24  4 bytes   version of the library, one byte a component
    32  u32       compute capabilities, one bit each
"""

import struct
from dataclasses import dataclass
from pathlib import Path

from sws_export.documents import open_regular
from sws_export.errors import EngineError

_MAGIC = {b"vtrt": "tensorrt-rtx", b"ftrt": "tensorrt", b"ptrt": "tensorrt"}
_CAPABILITY_BITS = {1: "7.5", 2: "8.0", 4: "8.6", 8: "8.9", 16: "12.0", 32: "12.1"}
_LENGTH = 36


@dataclass(frozen=True)
class PlanHeader:
    """Fields in the first bytes of a plan."""

    backend: str
    """Name of the backend that built it."""
    version: str
    """Version of the library that built it."""
    size: int | None
    """Size of the file in bytes; None if the header does not contain it."""
    compute_capabilities: tuple[str, ...]
    """Targets; empty if the header does not contain them."""


def plan_header(path: Path) -> PlanHeader:
    """Read the header of the plan at `path` and check that the file is complete.

    Raises:
        EngineError: The file is missing or is not a plan, or its size differs from the one in its header.
    """
    try:
        with open_regular(path) as file:
            head = file.read(_LENGTH)
        found = path.stat().st_size
    except OSError as error:
        raise EngineError(f"cannot read the engine {path}: {error.strerror}") from error
    backend = _MAGIC.get(head[:4])
    if backend is None:
        raise EngineError(
            f"{path} is not a TensorRT engine: it begins with {head[:4]!r}, "
            "expected b'vtrt', b'ftrt' or b'ptrt'"
        )
    if len(head) < _LENGTH:
        raise EngineError(f"the engine {path} is truncated: it has {found} bytes; build or copy it again")
    version = ".".join(str(part) for part in head[24:28])
    if backend != "tensorrt-rtx":
        return PlanHeader(backend, version, None, ())
    (size,) = struct.unpack_from("<Q", head, 16)
    if size != found:
        raise EngineError(
            f"the engine {path} is damaged: its header gives {size} bytes, the file has {found}; "
            "build or copy it again"
        )
    (mask,) = struct.unpack_from("<I", head, 32)
    capabilities = tuple(name for bit, name in _CAPABILITY_BITS.items() if mask & bit)
    return PlanHeader(backend, version, size, capabilities)

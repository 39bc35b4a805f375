"""Reading what a plan says about itself, without a driver.

The layout is not documented by NVIDIA, except bytes 24 to 27 (NVIDIA/TensorRT issue 3073). The rest was seen
on TensorRT-RTX 1.7 plans. It serves to recognise a file and to notice that it is cut short; only the runtime
decides whether a plan can be loaded.

    0   4 bytes   magic: "vtrt" TensorRT for RTX, "ftrt" or "ptrt" TensorRT
    16  u64       size of the whole file in bytes
    24  4 bytes   version of the library, one byte a component
    32  u32       compute capabilities, one bit each
"""

import struct
from dataclasses import dataclass
from pathlib import Path

from sws_export.errors import EngineError

_MAGIC = {b"vtrt": "tensorrt-rtx", b"ftrt": "tensorrt", b"ptrt": "tensorrt"}
_CAPABILITY_BITS = {1: "7.5", 2: "8.0", 4: "8.6", 8: "8.9", 16: "12.0", 32: "12.1"}
_LENGTH = 36


@dataclass(frozen=True)
class PlanHeader:
    """What the first bytes of a plan tell."""

    backend: str
    """Name of the backend that built it."""
    version: str
    """Version of the library that built it."""
    size: int | None
    """Bytes that the file should have; None where the header does not tell."""
    compute_capabilities: tuple[str, ...]
    """Targets; empty where the header does not tell."""


def plan_header(path: Path) -> PlanHeader:
    """Read the header of the plan at `path` and check that the file is complete.

    Raises:
        EngineError: The file is missing, is not a plan, or is shorter or longer than its header says.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_LENGTH)
        found = path.stat().st_size
    except OSError as error:
        raise EngineError(f"cannot read the engine {path}: {error.strerror}") from error
    backend = _MAGIC.get(head[:4])
    if backend is None:
        raise EngineError(
            f"{path} is not a TensorRT engine: it begins with {head[:4]!r}, expected b'vtrt' or b'ftrt'"
        )
    if len(head) < _LENGTH:
        raise EngineError(f"the engine {path} is cut short: it has {found} bytes; build or copy it again")
    version = ".".join(str(part) for part in head[24:28])
    if backend != "tensorrt-rtx":
        return PlanHeader(backend, version, None, ())
    (size,) = struct.unpack_from("<Q", head, 16)
    if size != found:
        raise EngineError(
            f"the engine {path} is damaged: its header says {size} bytes, the file has {found}; "
            "build or copy it again"
        )
    (mask,) = struct.unpack_from("<I", head, 32)
    capabilities = tuple(name for bit, name in _CAPABILITY_BITS.items() if mask & bit)
    return PlanHeader(backend, version, size, capabilities)

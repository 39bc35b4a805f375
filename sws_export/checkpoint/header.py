"""The header of a safetensors file, read strictly and without its tensors.

Format: https://huggingface.co/docs/safetensors/index#format. Eight bytes of header length, little endian;
a JSON object that gives each tensor's dtype, shape and place; the tensors, one after the other without gaps.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sws_export.errors import CheckpointError

# The limit that the reference implementation uses, too.
MAX_HEADER_BYTES = 100_000_000

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies on disk.

    `dtype` is the name the safetensors format uses (F16, BF16, F32, ...); `offset` counts bytes from the
    beginning of `file`; the elements are row-major, little endian, and not aligned to anything.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """All tensors of one file by their stored name, and the free text that came with them."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Read the header of `file`, whatever the size of the file in a few milliseconds.

    Raises:
        CheckpointError: The file is missing, truncated, no safetensors file, or contradicts itself.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            text = _header_text(file, stream.read(8), size)
            raw = stream.read(text)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file}: {error.strerror}; check the path and its permissions"
        ) from error
    entries = _parse_json(file, raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(
            f"{file} is damaged: __metadata__ in its header is no JSON object; fetch it again"
        )
    start = 8 + len(raw)
    tensors = {name: _stored_tensor(file, name, entry, start) for name, entry in entries.items()}
    _check_places(file, tensors, start, size)
    return Header(tensors, {str(key): str(value) for key, value in metadata.items()})


def _header_text(file: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise CheckpointError(
            f"{file} is no safetensors file: expected at least 8 bytes, found {size}; fetch it again"
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file} is no safetensors file: its first 8 bytes announce a header of {length} bytes, "
            f"the format allows {MAX_HEADER_BYTES}; check that it is the model and not a web page or a pickle"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{file} is truncated: its header needs {8 + length} bytes, found {size}; fetch it again"
        )
    return length


def _parse_json(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(
            f"{file} is no safetensors file or damaged: its header is no JSON ({reason}); fetch it again"
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError(
            f"{file} is damaged: expected a JSON object as header, found a {type(entries).__name__}; "
            "fetch it again"
        )
    return entries


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"'{name}' twice")
        entries[name] = value
    return entries


def _stored_tensor(file: Path, name: str, entry: object, start: int) -> StoredTensor:
    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{file} is damaged: tensor '{name}' {what}; fetch it again")

    if not isinstance(entry, dict):
        raise damaged("is not described by a JSON object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    place: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise damaged(f"has the unknown dtype {dtype!r}")
    if not _all_sizes(shape):
        raise damaged(f"has the shape {shape!r}, which is no list of sizes")
    if not _all_sizes(place) or len(place) != 2 or place[0] > place[1]:
        raise damaged(f"has the offsets {place!r}, which are no [begin, end]")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if place[1] - place[0] != expected:
        raise damaged(f"has {place[1] - place[0]} bytes, expected {expected} for {dtype} of shape {shape}")
    return StoredTensor(file, dtype, tuple(shape), start + place[0], expected)


def _all_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_places(file: Path, tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            kind = "overlaps the one before it" if tensor.offset < end else "leaves a gap before it"
            raise CheckpointError(
                f"{file} is damaged: tensor '{name}' {kind} (begins at byte {tensor.offset}, "
                f"expected {end}); fetch it again"
            )
        end += tensor.nbytes
    if size < end:
        raise CheckpointError(f"{file} is truncated: expected {end} bytes, found {size}; fetch it again")
    if size > end:
        raise CheckpointError(
            f"{file} is damaged: expected {end} bytes, found {size}, which no tensor uses; fetch it again"
        )

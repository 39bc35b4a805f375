"""Reads and validates the header of a safetensors file without reading its tensors.

Format: https://huggingface.co/docs/safetensors/index#format. Eight bytes of header length, little endian;
a JSON object with the dtype, shape and byte range of each tensor; the tensors, contiguous.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sws_export.documents import open_regular
from sws_export.errors import CheckpointError

# The reference implementation allows 100 MB. The header of SDXL with its text encoders has 0.3 MB, and parsed
# JSON can need 60 times its size.
MAX_HEADER_BYTES = 16_000_000
# Several times what published models have. Longer names and shapes are no tensors of a UNet, and reading the
# structure from names takes memory for each of their parts.
MAX_TENSORS = 100_000
MAX_NAME_LENGTH = 512
MAX_NAME_PARTS = 48
MAX_RANK = 8
_SHOWN = 80
_MAX_SIZE = 2**48

# First bytes of files that are named .safetensors by mistake.
_OTHER_FORMATS = {
    b"version ": "a pointer of git-lfs: the model was not downloaded; run 'git lfs pull' in its directory",
    b"GGUF": "a GGUF file, whose quantized weights are not supported; use the model's safetensors file",
    b"PK\x03\x04": "a pickle of torch.save; use the model's safetensors file",
    b"<!DOCTYP": "a web page; download the model again",
    b"<html": "a web page; download the model again",
}

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
    """The location of one tensor on disk; its elements are row-major, little endian and unaligned.

    Attributes:
        file: The safetensors file.
        dtype: Name of the dtype in the safetensors format: F16, BF16, F32, ...
        shape: Sizes of the dimensions.
        offset: First byte, counted from the beginning of `file`.
        nbytes: Number of bytes.
        scale: Factor of the values: one for all, [] or [1], or one for each row, [out] or [out, 1, ...]; or
            None.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    scale: "StoredTensor | None" = None


@dataclass(frozen=True)
class Header:
    """The tensors of one file by their stored name, and the file's metadata."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Read the header of `file`.

    Raises:
        CheckpointError: The file is missing, truncated, inconsistent, or not a safetensors file.
    """
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            raw = stream.read(_header_length(file, stream.read(8), size))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file}: {error.strerror}; check the path and its permissions"
        ) from error
    entries = _parse_json(file, raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(
            f"{file} is damaged: __metadata__ in its header is not a JSON object; download it again"
        )
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"{file} has {len(entries)} tensors, expected at most {MAX_TENSORS}")
    start = 8 + len(raw)
    tensors = {name: _stored_tensor(file, name, entry, start) for name, entry in entries.items()}
    _check_ranges(file, tensors, start, size)
    return Header(tensors, {str(key): str(value) for key, value in metadata.items()})


def _header_length(file: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise CheckpointError(
            f"{file} is not a safetensors file: expected at least 8 bytes, found {size}; download it again"
        )
    other = next((what for magic, what in _OTHER_FORMATS.items() if prefix.startswith(magic)), None)
    if other is not None:
        raise CheckpointError(f"{file} is not a safetensors file, but {other}")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file} is not a safetensors file: its first 8 bytes are a header length of {length} bytes, "
            f"expected at most {MAX_HEADER_BYTES}; check that it is the model and not a web page or a pickle"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{file} is truncated: its header needs {8 + length} bytes, found {size}; download it again"
        )
    return length


def _parse_json(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(
            f"{file} is damaged or not a safetensors file: its header is not valid JSON ({reason}); "
            "download it again"
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError(
            f"{file} is damaged: expected a JSON object as header, found a {type(entries).__name__}; "
            "download it again"
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
        return CheckpointError(f"{file} is damaged: tensor '{_cut(name)}' {what}; download it again")

    if len(name) > MAX_NAME_LENGTH or name.count(".") >= MAX_NAME_PARTS:
        raise damaged(
            f"has a name of {len(name)} characters, expected up to {MAX_NAME_LENGTH} and "
            f"{MAX_NAME_PARTS} parts"
        )
    if not isinstance(entry, dict):
        raise damaged("is not described by a JSON object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise damaged(f"has the unknown dtype {_short(dtype)}")
    if not _all_sizes(shape) or len(shape) > MAX_RANK:
        raise damaged(f"has the shape {_short(shape)}, expected a list of up to {MAX_RANK} sizes")
    if not _all_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(f"has the offsets {_short(offsets)}, expected [begin, end]")
    begin, end = offsets
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != expected:
        raise damaged(f"has {end - begin} bytes, expected {expected} for {dtype} of shape {shape}")
    return StoredTensor(file, dtype, tuple(shape), start + begin, expected)


def _short(value: object) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _all_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_SIZE for item in value)


def _check_ranges(file: Path, tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            kind = "overlaps the one before it" if tensor.offset < end else "leaves a gap before it"
            raise CheckpointError(
                f"{file} is damaged: tensor '{name}' {kind} (begins at byte {tensor.offset}, "
                f"expected {end}); download it again"
            )
        end += tensor.nbytes
    if size < end:
        raise CheckpointError(f"{file} is truncated: expected {end} bytes, found {size}; download it again")
    if size > end:
        raise CheckpointError(
            f"{file} is damaged: its tensors end at byte {end}, the file at {size}; download it again"
        )

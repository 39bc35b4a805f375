"""Reading a metadata property of an ONNX file without parsing its graph, and without the `onnx` package.

The protobuf encoding is described at https://protobuf.dev/programming-guides/encoding.
"""

import io
import os
from collections.abc import Iterator
from typing import BinaryIO

# ONNX's protobuf schema (onnx/onnx.proto3): ModelProto.graph and ModelProto.metadata_props, and the key and
# value of a StringStringEntryProto.
_GRAPH, _METADATA_PROPS = 7, 14
_KEY, _VALUE = 1, 2
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


def metadata_property(file: BinaryIO, key: str) -> str | None:
    """The value of a metadata property of an ONNX model; None where it has no such property.

    Raises:
        ValueError: The file is not an ONNX model, or is cut short.
    """
    found, has_graph = None, False
    for number, length in _fields(file):
        has_graph |= number == _GRAPH
        if number != _METADATA_PROPS:
            continue
        content = io.BytesIO(file.read(length))
        entry = {field: content.read(size).decode() for field, size in _fields(content)}
        if entry.get(_KEY) == key:
            found = entry.get(_VALUE, "")
    if not has_graph:
        raise ValueError("it has no graph")
    return found


def _fields(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Number and length of each length-delimited field of a protobuf message, with `file` at its content."""
    begin = file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(begin)
    while (position := file.tell()) < end:
        number, wire_type = divmod(_varint(file), 8)
        if wire_type == _VARINT:
            _varint(file)
            continue
        if wire_type not in (_FIXED64, _LENGTH_DELIMITED, _FIXED32):
            raise ValueError(f"there is no protobuf field at byte {position}")
        length = _varint(file) if wire_type == _LENGTH_DELIMITED else {_FIXED64: 8, _FIXED32: 4}[wire_type]
        following = file.tell() + length
        if following > end:
            raise ValueError(f"it has {end} bytes, the field at byte {position} ends at {following}")
        if wire_type == _LENGTH_DELIMITED:
            yield number, length
        file.seek(following)


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("it ends within a number")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("a number has more than 10 bytes")

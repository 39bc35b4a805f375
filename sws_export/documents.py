"""JSON documents from outside: reading regular files, parsing, and checking against a schema with msgspec.

A schema is a `TypedDict` (or another type that msgspec supports) whose annotations bound numbers, lengths and
patterns with `msgspec.Meta`. What a schema does not name is kept: documents of later versions stay readable.
"""

import errno
import json
import os
import re
import stat
from io import BufferedReader
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

T = TypeVar("T")

MAX_DOCUMENT_BYTES = 16_000_000
"""Larger files are no configuration: those of UNets have a few kilobytes, manifests some hundred."""

# A drive letter makes a name on Windows a path of another drive.
_FILE_NAME = r"^(?!\.{1,2}$)(?![A-Za-z]:)[^/\\\x00-\x1f]+$"
_SHA256 = r"^[0-9a-f]{64}$"
FileName = Annotated[str, msgspec.Meta(pattern=_FILE_NAME, max_length=255)]
"""Name of a file without directories."""
Sha256 = Annotated[str, msgspec.Meta(pattern=_SHA256)]
"""A sha256 in lower-case hex."""
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
"""A number of bytes, layers or nanoseconds."""

_KINDS = (
    (stat.S_ISDIR, "it is a directory"),
    (stat.S_ISFIFO, "it is a FIFO, not a file"),
    (stat.S_ISSOCK, "it is a socket, not a file"),
    (stat.S_ISCHR, "it is a device, not a file"),
    (stat.S_ISBLK, "it is a device, not a file"),
)
_TYPE_NAMES = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "an integer",
    "null": "null",
    "object": "an object",
    "str": "a string",
}
_PATTERN_NAMES = {
    f"`str` matching regex {_FILE_NAME!r}": "the name of a file in the same directory",
    f"`str` matching regex {_SHA256!r}": "a sha256 in hex",
}
_PATH = re.compile(r" - at (?:`key` in )?`\$([^`]*)`")
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; a FIFO or device is rejected instead of waited for.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    # Without O_NONBLOCK opening a FIFO waits for a writer. Regular files ignore the flag; Windows has none.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    mode = os.fstat(descriptor).st_mode
    reason = next((reason for check, reason in _KINDS if check(mode)), None)
    if reason is not None:
        os.close(descriptor)
        raise OSError(errno.EINVAL, reason, str(path))
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, limit: int = MAX_DOCUMENT_BYTES) -> str:
    """The UTF-8 text of a regular file.

    Raises:
        OSError: It cannot be read, or is not a regular file.
        ValueError: It has more than `limit` bytes, or is not UTF-8.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error


def parse_json(text: str | bytes) -> Any:
    """The values of a JSON text.

    Raises:
        ValueError: It is not JSON; NaN, Infinity and lone surrogates are not.
    """
    try:
        return msgspec.json.decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except msgspec.MsgspecError as error:
        raise ValueError(_lower(str(error))) from error


def check_document(document: Any, schema: type[T]) -> T:
    """`document` itself, after it was checked against `schema`.

    Args:
        document: As `parse_json` returns it.
        schema: A type that msgspec supports.

    Raises:
        ValueError: Names the field, what it should be and what was found.
    """
    try:
        msgspec.convert(document, schema)
    except msgspec.ValidationError as error:
        raise ValueError(_describe(str(error), document, schema)) from error
    checked: T = document
    return checked


def _describe(message: str, document: Any, schema: Any) -> str:
    """msgspec's message as `field: expected …, found …`."""
    match = _PATH.search(message)
    expected = message[: match.start()] if match else message
    field, value, schema = _locate(match[1] if match else "", document, schema)
    where = f"{field}: " if field else ""
    if missing := re.match(r"Object missing required field `(.*)`", expected):
        return f"{field or 'it'} has no field '{missing[1]}'"
    expected = re.sub(r", got `.*`", "", expected)
    for pattern, name in _PATTERN_NAMES.items():
        expected = expected.replace(pattern, name)
    if expected.startswith("Invalid enum value"):
        expected = f"expected one of {', '.join(map(str, get_args(_plain(schema))))}"
    types = re.sub(
        r"`([a-z |]+)`",
        lambda found: " or ".join(_TYPE_NAMES.get(name, name) for name in found[1].split(" | ")),
        expected,
    )
    return f"{where}{_lower(types)}, found {short(value)}"


def _locate(path: str, value: Any, schema: Any) -> tuple[str, Any, Any]:
    """Field, value and schema at a path of msgspec, which does not name the keys of a dict."""
    field = ""
    for name, index in _STEP.findall(path):
        schema = _plain(schema)
        if name:
            schema = get_type_hints(schema, include_extras=True)[name]
            field, value = f"{field}.{name}".lstrip("."), value[name]
            continue
        schema = get_args(schema)[-1]
        if index == "...":
            index = next(key for key, entry in value.items() if not _conforms(entry, schema))
            field, value = f"{field}[{index}]", value[index]
        else:
            field, value = f"{field}[{index}]", value[int(index)]
    return field, value, schema


def _conforms(value: Any, schema: Any) -> bool:
    try:
        msgspec.convert(value, schema)
    except msgspec.ValidationError:
        return False
    return True


def _plain(schema: Any) -> Any:
    """`schema` without `Annotated`, `NotRequired` and None."""
    while True:
        arguments = [argument for argument in get_args(schema) if argument is not NoneType]
        origin = get_origin(schema)
        if (
            origin is None
            or origin in (list, dict, Literal)
            or (len(arguments) > 1 and origin is not Annotated)
        ):
            return schema
        schema = arguments[0]


def short(value: Any) -> str:
    """`value` as JSON for a message, shortened."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:] if not text.startswith("JSON") else text

"""Strategies of hypothesis that damage JSON documents and bytes."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    -0.0,
    7,
    2**15,
    2**31,
    2**53,
    2**63,
    2**64,
    10**40,
    1e308,
    float("nan"),
    float("-inf"),
    "",
    "a",
    "1",
    ".",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "nul\0byte",
    "\x1b[2J\x9b1m",
    "\ud800",
    "</script><script>",
    "{0.__class__}",
    "%s%n",
    "(a+)+$",
    "(",
    "x" * 300,
    "x" * 100_000,
    "a." * 2000,
    "1/0",
    "batch",
    "height/0",
    [],
    {},
    [None],
    ["a"],
    [0] * 5000,
    [[[]]],
    {"a": {}},
    {"": None},
    {"__class__": "x", "format": 2},
)

NO_DOCUMENTS = (b"[" * 200_000, b'{"a":' * 50_000, b"9" * 10_000, b"\xef\xbb\xbf{}", b"")


@st.composite
def damaged_document(draw: st.DrawFn, document: Any) -> Any:
    """`document` with one to three of its values replaced, removed, moved or added."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        changed = _change(draw, changed)
    return changed


def _change(draw: st.DrawFn, value: Any) -> Any:
    """`value`, with a value at some depth changed."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return copy.deepcopy(draw(st.sampled_from(HOSTILE)))
    keys: list[Any] = sorted(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    action = draw(st.sampled_from(("descend", "descend", "descend", "replace", "remove", "add", "copy")))
    if action == "descend":
        value[key] = _change(draw, value[key])
    elif action == "replace":
        value[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
    elif action == "remove":
        del value[key]
    elif isinstance(value, list):
        value.insert(key, copy.deepcopy(value[key] if action == "copy" else draw(st.sampled_from(HOSTILE))))
    else:
        name = draw(st.sampled_from([*keys, *(text for text in HOSTILE if isinstance(text, str))]))
        value[name] = copy.deepcopy(value[key] if action == "copy" else draw(st.sampled_from(HOSTILE)))
    return value


@st.composite
def damaged_json(draw: st.DrawFn, document: Any) -> bytes:
    """The text of a damaged document, or the damaged text of the document."""
    if draw(st.integers(0, 3)):
        return json.dumps(draw(damaged_document(document))).encode()
    if draw(st.integers(0, 9)) == 0:
        return draw(
            st.sampled_from((b"[" * 200_000, b'{"a":' * 50_000, b"9" * 10_000, b"\xef\xbb\xbf{}", b""))
        )
    return draw(damaged_bytes(json.dumps(document).encode()))


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes, window: int | None = None) -> bytes:
    """`content` with one to four changes, within its first `window` bytes if that is given."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        end = min(len(data), window or len(data))
        place = draw(st.integers(0, max(end - 1, 0)))
        length = draw(st.sampled_from((1, 2, 4, 8, 40, 1000)))
        match draw(st.integers(0, 5)):
            case 0:
                data[place : place + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                data[place : place + length] = draw(st.sampled_from((b"\0", b"\xff", b"\x80", b'"'))) * length
            case 2:
                del data[place:]
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = draw(st.binary(min_size=1, max_size=16))
            case _:
                other = draw(st.integers(0, max(end - 1, 0)))
                data[place:place] = data[other : other + length]
    return bytes(data)

"""Reading JSON documents: regular files only, bounded, and errors that name the field."""

import os
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pytest

from sws_export.documents import check_document, parse_json, read_text


class Document(TypedDict):
    size: int
    levels: NotRequired[dict[str, list[int]] | None]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_files_that_are_not_regular(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path, reason in ((tmp_path / "fifo", "FIFO"), (tmp_path / "link", "device"), (tmp_path, "directory")):
        with pytest.raises(OSError, match=f"it is a {reason}"):
            read_text(path)


def test_a_file_that_is_too_large_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"12345\xff")
    with pytest.raises(ValueError, match="more than 5 bytes"):
        read_text(tmp_path / "a.json", 5)
    with pytest.raises(ValueError, match="not UTF-8"):
        read_text(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["", "{", '{"a": NaN}', "[" * 100_000, '"\\ud800"', "1" * 5000, b"\xff"])
def test_text_that_is_no_json(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"JSON|truncated|deeply|out of range"):
        parse_json(text)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], r"^expected an object, found \[\]"),
        ({}, "it has no field 'size'"),
        ({"size": True}, "size: expected an integer, found true"),
        ({"size": 1, "levels": 3}, "levels: expected an object or null, found 3"),
        (
            {"size": 1, "levels": {"a": [], "b": [1, "x"]}},
            r'levels\[b\]\[1\]: expected an integer, found "x"',
        ),
    ],
)
def test_a_document_of_another_schema(document: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_document(document, Document)


def test_fields_of_later_versions_are_kept() -> None:
    document = {"size": 1, "levels": None, "later": [1]}
    assert check_document(document, Document) is document

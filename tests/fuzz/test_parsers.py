"""Damaged files: each ends in a result or one SwsExportError, quickly, and leaves nothing behind."""

import functools
import os
from pathlib import Path

import pytest

from sws_export.errors import SwsExportError
from tests.fuzz.parsers import Parser, parsers, put, read_graph, small_graph
from tests.fuzz.run import fuzz

NAMES = (
    *("checkpoint header", "shard index", "config.json", "LoRA", "plain ONNX", "manifest", "plan header"),
    *("cache entry", "cached digest"),
)
CASES = 23
MANY = 230

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the timers of POSIX"),
    # Hypothesis warns of the length of a failing example.
    pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning"),
]


@functools.cache
def by_name() -> dict[str, Parser]:
    return {parser.name: parser for parser in parsers()}


def test_every_parser_is_listed() -> None:
    assert tuple(by_name()) == NAMES
    assert CASES * len(NAMES) >= 200
    assert MANY * len(NAMES) >= 2000


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    counts = fuzz(by_name()[name], CASES, tmp_path)
    assert counts.cases == counts.results + counts.refused >= CASES


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_damaged_files(name: str, tmp_path: Path) -> None:
    counts = fuzz(by_name()[name], MANY, tmp_path, number=1)
    assert counts.cases == counts.results + counts.refused >= MANY


@pytest.mark.parametrize("name", NAMES)
def test_undamaged_files_are_read(name: str, tmp_path: Path) -> None:
    parser = by_name()[name]
    parser.write(tmp_path)
    put(tmp_path / parser.place, parser.valid)
    parser.read(tmp_path)


@pytest.mark.parametrize("name", [b"resnets", b"conv1/Conv", b"Conv", b"sample"])
def test_a_name_in_a_graph_that_is_not_utf_8(name: bytes, tmp_path: Path) -> None:
    """Found by damaged graphs: protobuf returns such names as bytes."""
    put(tmp_path / "g.onnx", small_graph().replace(name, b"\xff" + name[1:]))
    with pytest.raises(SwsExportError, match=r"g\.onnx"):
        read_graph(tmp_path)

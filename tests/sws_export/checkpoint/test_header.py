import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from sws_export.checkpoint.header import read_header
from sws_export.errors import CheckpointError


def write(file: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(begin: int, end: int, shape: Any = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float16).reshape(2, 3),
        "b": np.array(7, dtype=np.int64),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "c": np.ones(5, dtype=np.uint8),
    }
    file = tmp_path / "x.safetensors"
    save_file(arrays, file, metadata={"format": "np"})
    header = read_header(file)
    assert header.metadata == {"format": "np"}
    with safe_open(file, "np") as reference:
        assert set(header.tensors) == set(reference.keys())
        for name, tensor in header.tensors.items():
            view = reference.get_slice(name)
            assert (tensor.dtype, list(tensor.shape)) == (view.get_dtype(), view.get_shape())
            content = file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
            assert content == arrays[name].tobytes()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*No such file"):
        read_header(tmp_path / "none.safetensors")


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_too_short_for_a_header_length(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"expected at least 8 bytes, found {len(content)}"):
        read_header(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a pointer of git-lfs.*git lfs pull",
        ),
        (b"GGUF\x03\x00\x00\x00\x00\x00", "a GGUF file"),
        (b"PK\x03\x04\x00\x00\x00\x00\x00\x00", "a pickle of torch.save"),
        (b"<!DOCTYPE html>", "a web page"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"is not a safetensors file, but {message}"):
        read_header(file)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 16_000_001])
def test_huge_header_is_refused_before_anything_is_allocated(tmp_path: Path, length: int) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match=f"are a header length of {length} bytes"):
        read_header(file)


def test_header_longer_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", 1000) + b"{}")
    with pytest.raises(CheckpointError, match="truncated: its header needs 1008 bytes, found 10"):
        read_header(file)


def test_truncated_data(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", {"a": entry(0, 8)}, b"1234567")
    size = file.stat().st_size
    with pytest.raises(CheckpointError, match=f"truncated: expected {size + 1} bytes, found {size}"):
        read_header(file)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"\xff\xfe", b"", "its header is not valid JSON"),
        (b"<!DOCTYPE html>", b"", "its header is not valid JSON"),
        (b"[" * 100_000, b"", "its header is not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", "'a' twice"),
        ([], b"", "expected a JSON object"),
        ({"__metadata__": 3}, b"", "__metadata__"),
        ({"a": 3}, b"", "'a' is not described by a JSON object"),
        ({"a": entry(0, 1, dtype="F12")}, b"1", "unknown dtype 'F12'"),
        ({"a": entry(0, 1, shape=[-1])}, b"1", r"shape \[-1\]"),
        ({"a": entry(0, 1, shape=[True])}, b"1", r"shape \[True\]"),
        ({"a": entry(0, 1, shape="1")}, b"1", "shape '1'"),
        ({"a": entry(1, 0, shape=[1])}, b"1", "expected \\[begin, end\\]"),
        ({"a": {**entry(0, 1), "data_offsets": [0]}}, b"1", "expected \\[begin, end\\]"),
        ({"a": {"dtype": "U8"}}, b"1", "shape None"),
        ({"a": entry(0, 2, shape=[2**62, 4], dtype="F16")}, b"12", "shape .*4611686018427387904, 4"),
        ({"a": entry(0, 2, shape=[2**40, 4], dtype="F16")}, b"12", "has 2 bytes, expected"),
        ({"a": entry(0, 1, shape=[1] * 9)}, b"1", r"expected a list of up to 8 sizes"),
        ({"a" * 600: entry(0, 1)}, b"1", r"tensor 'a{80}…' has a name of 600 characters"),
        ({"a." * 50: entry(0, 1)}, b"1", r"has a name of 100 characters, expected up to 512 and 48 parts"),
        ({f"{n}": entry(0, 0) for n in range(100_001)}, b"", "has 100001 tensors, expected at most 100000"),
        ({"a": entry(0, 3, shape=[2], dtype="F16")}, b"123", "has 3 bytes, expected 4 for F16"),
        ({"a": entry(0, 2), "b": entry(1, 3)}, b"123", "'b' overlaps"),
        ({"a": entry(0, 2), "b": entry(0, 2)}, b"12", "overlaps"),
        ({"a": entry(0, 2), "b": entry(3, 4)}, b"1234", "'b' leaves a gap"),
        ({"a": entry(1, 2)}, b"12", "'a' leaves a gap"),
        ({"a": entry(0, 1)}, b"12", "its tensors end at byte .*, the file at"),
    ],
)
def test_damage_is_named(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    file = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 200), value=st.integers(0, 255))
def test_a_changed_byte_never_escapes_as_another_error(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    write(file, {"a": entry(0, 4, [2], "F16"), "b": entry(4, 8, [1, 1], "F32")}, b"\0" * 8)
    content = bytearray(file.read_bytes())
    content[position % len(content)] = value
    file.write_bytes(content)
    try:
        header = read_header(file)
    except CheckpointError:
        return
    assert sum(tensor.nbytes for tensor in header.tensors.values()) == 8

"""Reading metadata from ONNX files, compared with the `onnx` package."""

import contextlib
import io
import itertools

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from sws_export.manifest.onnx_metadata import metadata_property

VALUE = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])


def model(properties: dict[str, str]) -> onnx.ModelProto:
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [VALUE], [VALUE])
    graph.initializer.append(helper.make_tensor("weights", onnx.TensorProto.FLOAT, [4096], [0.0] * 4096))
    made = helper.make_model(graph, producer_name="somebody", doc_string="a text", model_version=2**40)
    helper.set_model_props(made, properties)
    return made


@given(st.dictionaries(st.text(), st.text(), max_size=3), st.text())
def test_the_same_as_the_onnx_package(properties: dict[str, str], key: str) -> None:
    file = io.BytesIO(model(properties).SerializeToString())
    for name in {*properties, key}:
        file.seek(0)
        assert metadata_property(file, name) == properties.get(name)


def test_a_long_value() -> None:
    text = "0123456789" * 100_000
    file = io.BytesIO(model({"a": "b", "long": text}).SerializeToString())
    assert metadata_property(file, "long") == text


def test_a_file_that_is_cut_short() -> None:
    """Protobuf messages have no length of their own: a cut between two fields goes unnoticed."""
    content = model({"a": "b"}).SerializeToString()
    between = []
    for length in itertools.chain(range(64), range(len(content) - 32, len(content))):
        try:
            metadata_property(io.BytesIO(content[:length]), "a")
        except ValueError:
            continue
        between.append(length)
    assert 1 <= len(between) <= 3


@pytest.mark.parametrize("content", [b"", b"no graph", b"\xff" * 100, b"\x08\x0a", b"PK\x03\x04" * 8])
def test_other_files(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^(it|a number|there) \w+"):
        metadata_property(io.BytesIO(content), "a")


@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    with contextlib.suppress(ValueError):
        metadata_property(io.BytesIO(content), "a")

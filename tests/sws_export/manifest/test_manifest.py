"""Reading manifests: both formats, both places, and whatever else such a file may contain."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sws_export.errors import ManifestError
from sws_export.manifest import (
    FORMAT_VERSION,
    manifest_path,
    parse_manifest,
    profiles_of,
    read_embedded,
    read_manifest,
    tensor_specs,
    write_manifest,
)

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RECORDED / f"format_1_{name}.json").read_text("utf-8"))
    return document


def current(name: str = "sws") -> dict[str, Any]:
    return dict(parse_manifest(json.dumps(recorded(name)), name))


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "dtype": "float32", "shape": [1]} | changes


def file_entry(**changes: Any) -> dict[str, Any]:
    return {"name": "sws.onnx", "bytes": 1, "sha256": "0" * 64} | changes


def test_format_1_is_converted() -> None:
    found = read_manifest(RECORDED / "format_1_sws.json")
    assert found["format"] == FORMAT_VERSION == 2
    assert (found["preset"], found["shared_inputs"]) == ("sws", [])
    assert [(state["input"], state["persistent"]) for state in found["states"]] == [
        ("sws_state_d2", False),
        ("sws_state_text", False),
    ]
    assert found["debug_outputs"] is not None
    assert found["debug_outputs"]["outputs"]["kl_cap"] == "sws_debug_kl_cap"
    assert not {"batch_wide", "resets"} & {*found, *found["states"][0]}
    changed = {"format", "states", "batch_wide", "shared_inputs", "profile", "profiles"}
    assert {**found, **dict.fromkeys(changed)} == {**recorded("sws"), **dict.fromkeys(changed)}


def test_the_published_nodes_state_in_format_1_is_persistent() -> None:
    found = read_manifest(RECORDED / "format_1_node.json")
    assert (found["preset"], found["shared_inputs"]) == ("comfyui-node", ["sigma", "intensity"])
    assert [state["persistent"] for state in found["states"]] == [True]
    assert found["debug_outputs"] is None


def test_the_first_manifests_of_format_1() -> None:
    """They had no preset, guard, target, grid and files."""
    document = recorded("sws")
    for name in ("preset", "guard", "target", "batch_wide", "debug_outputs", "files"):
        del document[name]
    document["states"] = [
        {name: value for name, value in state.items() if name not in ("grid", "resets")}
        for state in document["states"][:1]
    ]
    found = parse_manifest(json.dumps(document), "m.json")
    assert (found["preset"], found["guard"]) == ("sws", {"form": "literal", "rows": "1"})
    assert (found["states"][0]["grid"], found["states"][0]["persistent"]) == ("d2", False)
    del document["states"][0]
    plain = parse_manifest(json.dumps(document | {"sws": None}), "m.json")
    assert (plain["preset"], plain["guard"]) == (None, None)


def test_a_manifest_is_written_and_read_again(tmp_path: Path) -> None:
    path = manifest_path(tmp_path / "e.plan")
    assert path == tmp_path / "e.plan.json"
    found = read_manifest(RECORDED / "format_1_sws.json")
    write_manifest(found, path)
    assert read_manifest(path) == found


def test_typed_parts() -> None:
    found = read_manifest(RECORDED / "format_1_sws.json")
    assert tensor_specs(found["inputs"])[2].shape == ("batch", "tokens", 16)
    assert profiles_of(found) == ()
    names = [entry["name"] for entry in found["inputs"]]
    profile = {name: {"min": [1], "opt": [2], "max": [3]} for name in names}
    found["profiles"] = [profile, profile]
    shapes = dict.fromkeys(names, ((1,), (2,), (3,)))
    assert profiles_of(found) == (shapes, shapes)


def test_query_rows_of_the_kl_divergence() -> None:
    guard = {"form": "fused", "rows": "kl:1/8"}
    assert parse_manifest(json.dumps(current() | {"guard": guard}), "m.json")["guard"] == guard


def test_a_manifest_with_one_profile_is_read() -> None:
    names = [entry["name"] for entry in current()["inputs"]]
    profile = {name: {"min": [1], "opt": [2], "max": [3]} for name in names}
    found = parse_manifest(json.dumps(current() | {"profile": profile}), "m.json")
    assert found["profiles"] == [profile]
    assert "profile" not in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "has format 99; this version reads formats 1 and 2"),
        ({"inputs": "sample"}, 'malformed: inputs: expected a list, found "sample"'),
        ({"opset": True}, "opset: expected an integer, found true"),
        ({"precision": "fp8"}, 'precision: expected one of fp32, fp16, bf16, found "fp8"'),
        ({"inputs": [{"name": "sample", "dtype": "float32"}]}, r"inputs\[0\] has no field 'shape'"),
        (
            {"inputs": [{"name": "sample", "dtype": "float32", "shape": [1, 1.5]}]},
            r"inputs\[0\]\.shape\[1\]: expected an integer or a string, found 1\.5",
        ),
        ({"sites": {"d2": [1]}}, r"sites\[d2\]\[0\]: expected a string, found 1"),
        ({"debug_outputs": {"outputs": {"kl": "x"}, "sites": []}}, "debug_outputs: 'x' is not among"),
        ({"shared_inputs": ["x"]}, "shared_inputs: 'x' is not among encoder_hidden_states, intensity"),
        ({"outputs": []}, "states: 'sws_state_d2_out' is not among"),
        ({"outputs": [], "states": []}, "outputs: 'out_sample' is not among"),
        ({"profiles": [{}]}, r"inputs: '\w+' is not among"),
        ({"profiles": [{"x": {"min": [1], "opt": [1], "max": [1]}}]}, "profiles: 'x' is not among"),
        ({"profiles": []}, r"profiles: expected a list of length >= 1, found \[\]"),
        ({"files": [{"name": "sws.onnx", "bytes": 1}]}, r"files\[0\] has no field 'sha256'"),
        ({"files": [file_entry(name="../x")]}, r'files\[0\]\.name: expected the name of a file .* "\.\./x"'),
        ({"files": [file_entry(name="..")]}, r"files\[0\]\.name: expected the name of a file"),
        (
            {"files": [file_entry(sha256="ABC")]},
            r"files\[0\]\.sha256: expected a sha256 in hex, found \"ABC\"",
        ),
        ({"files": [file_entry(bytes=-1)]}, r"files\[0\]\.bytes: expected an integer >= 0, found -1"),
        ({"artefact": "a/b"}, "artefact: expected the name of a file"),
        ({"artefact": "D:x.onnx"}, "artefact: expected the name of a file in the same directory, found"),
        ({"guard": {"form": "fused", "rows": "1/0"}}, r"guard\.rows: expected a string matching .* \"1/0\""),
        ({"guard": {"form": "fused", "rows": "kl:1"}}, r"guard\.rows: expected a string matching"),
        ({"opset": 10**30}, r"opset: expected an integer <= 1000, found 1000"),
        ({"outputs": [tensor(shape=["batch"] * 9)]}, r"outputs\[0\]\.shape: expected a list of length <= 8"),
        ({"outputs": [tensor(shape=["__class__"])]}, r"outputs\[0\]\.shape\[0\]: expected a string matching"),
        (
            {"outputs": [tensor(dtype="object")]},
            r"outputs\[0\]\.dtype: expected one of bfloat16, .*\"object\"",
        ),
        ({"sws": {"scales": [1]}}, r"sws\.scales: expected a list of length >= 3, found \[1\]"),
        (
            {"engine": {"backend": "x"}},
            r"engine\.backend: expected one of tensorrt, tensorrt-rtx, found \"x\"",
        ),
        (
            {"profiles": [{"sample": {"min": [1], "opt": [1], "max": 1}}]},
            r"profiles\[0\]\[sample\]\.max: expected a list",
        ),
    ],
)
def test_malformed_manifests(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=rf"m\.json.*{message}"):
        parse_manifest(json.dumps(current() | change), "m.json")


@pytest.mark.parametrize("name", ["inputs", "outputs", "states", "source", "sws"])
@pytest.mark.parametrize("document", [recorded, current])
def test_a_field_is_missing(name: str, document: Callable[[str], dict[str, Any]]) -> None:
    found = document("sws")
    del found[name]
    with pytest.raises(ManifestError, match=f"m.json is malformed: it has no field '{name}'; export again"):
        parse_manifest(json.dumps(found), "m.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "12", "null"])
def test_text_that_is_no_manifest(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(ManifestError, match=r"m\.json is not a manifest: .*; export again"):
        read_manifest(tmp_path / "m.json")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ManifestError, match=r"m\.json is not a manifest: it is not UTF-8"):
        read_manifest(tmp_path / "m.json")
    with pytest.raises(ManifestError, match=r"cannot read the manifest .*absent\.json: No such file"):
        read_manifest(tmp_path / "absent.json")
    with pytest.raises(ManifestError, match=r"cannot read .*absent\.onnx: No such file"):
        read_embedded(tmp_path / "absent.onnx")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    ),
    st.sampled_from(sorted(current())),
    st.sampled_from([recorded, current]),
)
def test_any_value_in_any_field_is_taken_or_refused(
    value: Any, field: str, document: Callable[[str], dict[str, Any]]
) -> None:
    text = json.dumps(document("sws") | {field: value})
    with contextlib.suppress(ManifestError):
        parse_manifest(text, "m.json")

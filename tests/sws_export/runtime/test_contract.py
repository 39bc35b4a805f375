"""Reading manifests, and files that do not belong to them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from sws_export.engines.gpu import gpu_count
from sws_export.errors import EngineError, OptionError
from sws_export.manifest import METADATA_KEY
from sws_export.runtime import Session
from sws_export.runtime.contract import read_contract

Edit = Callable[..., Path]


def manifest_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def make_plan(path: Path, size: int = 64, bits: int = 8) -> Path:
    """A file with the header of a TensorRT for RTX plan."""
    head = b"vtrt" + bytes(12) + size.to_bytes(8, "little") + bytes([1, 7, 1, 116]) + bytes(4)
    head += bits.to_bytes(4, "little")
    path.write_bytes(head.ljust(size, b"\0"))
    return path


def test_fields_of_the_contract(sws_graph: Path) -> None:
    contract = read_contract(sws_graph)
    assert contract.backend == "onnxruntime"
    assert [spec.name for spec in contract.inputs] == [
        "sample",
        "timestep",
        "encoder_hidden_states",
        "sigma",
        "intensity",
    ]
    assert [(pair.spec.name, pair.output) for pair in contract.states] == [
        ("sws_state_d2", "sws_state_d2_out")
    ]
    assert contract.prediction.shape == ("batch", 4, "height", "width")
    assert contract.profiles == ()


def test_a_graph_needs_its_manifest(graph_copy: Path) -> None:
    manifest_of(graph_copy).unlink()
    with pytest.raises(EngineError, match=r"manifest .*sws\.onnx\.json is missing.*copy it from where"):
        Session.load(graph_copy, verify=False)


def test_a_renamed_graph_is_the_same(graph_copy: Path) -> None:
    renamed = graph_copy.with_name("other.onnx")
    manifest_of(graph_copy).rename(manifest_of(renamed))
    graph_copy.rename(renamed)
    Session.load(renamed)


def test_an_engine_needs_its_manifest(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "engine.plan")
    with pytest.raises(EngineError, match=r"manifest .*engine\.plan\.json is missing.*copy it from where"):
        Session.load(plan)


def test_another_file_than_the_manifest_is_of(graph_copy: Path) -> None:
    model = onnx.load(graph_copy)
    model.doc_string = "changed"
    onnx.save(model, graph_copy)
    with pytest.raises(EngineError, match=r"sws\.onnx is not the file that .* was written for: its size"):
        Session.load(graph_copy, verify=False)
    document = json.loads(manifest_of(graph_copy).read_text())
    document["files"][0]["bytes"] = graph_copy.stat().st_size
    manifest_of(graph_copy).write_text(json.dumps(document))
    with pytest.raises(EngineError, match=r"sws\.onnx is not the file that .* was written for: its sha256"):
        Session.load(graph_copy)
    Session.load(graph_copy, verify=False)


@pytest.mark.parametrize("verify", [False, True])
def test_a_manifest_that_does_not_list_the_artefact(edit_manifest: Edit, verify: bool) -> None:
    with pytest.raises(EngineError, match=r"json does not list sws\.onnx with its size and sha256"):
        Session.load(edit_manifest(files=[]), verify=verify)


def test_a_manifest_that_does_not_list_the_weights(graph_copy: Path) -> None:
    graph_copy.with_name("sws.onnx.data").write_bytes(b"")
    with pytest.raises(EngineError, match=r"json does not list sws\.onnx\.data with its size and sha256"):
        Session.load(graph_copy)


def test_missing_weights_file(edit_manifest: Edit, sws_graph: Path) -> None:
    files = json.loads(manifest_of(sws_graph).read_text())["files"]
    graph = edit_manifest(files=[*files, {"name": "sws.onnx.data", "bytes": 1, "sha256": "0" * 64}])
    with pytest.raises(EngineError, match=r"sws\.onnx\.data is missing: sws\.onnx needs it"):
        Session.load(graph)


def test_a_manifest_of_another_graph(edit_manifest: Edit) -> None:
    graph = edit_manifest(sws={"beta": 0.5})
    with pytest.raises(
        EngineError, match=r"is not the manifest of sws\.onnx: they differ in 'sws'; copy both"
    ):
        Session.load(graph)


def test_a_manifest_and_a_description_of_another_graph(graph_copy: Path) -> None:
    """Both are changed alike, and the sha256 is that of the changed graph."""
    model = onnx.load(graph_copy)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    inside = json.loads(properties[METADATA_KEY])
    inside["inputs"][0]["shape"][1] = inside["outputs"][0]["shape"][1] = 9
    onnx.helper.set_model_props(model, properties | {METADATA_KEY: json.dumps(inside)})
    onnx.save(model, graph_copy)
    content = graph_copy.read_bytes()
    entry = {"name": "sws.onnx", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    document = json.loads(manifest_of(graph_copy).read_text()) | inside | {"files": [entry]}
    manifest_of(graph_copy).write_text(json.dumps(document))
    with pytest.raises(
        EngineError, match=r"does not describe sws\.onnx: input sample: .*\[batch, 4, height, width\]"
    ):
        Session.load(graph_copy)


def test_a_manifest_of_a_later_format(edit_manifest: Edit) -> None:
    with pytest.raises(EngineError, match="has format 99; this version reads formats 1 and 2"):
        Session.load(edit_manifest(format=99))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_manifest(graph_copy: Path, text: str) -> None:
    manifest_of(graph_copy).write_text(text)
    with pytest.raises(EngineError, match=r"sws\.onnx\.json is not a manifest"):
        Session.load(graph_copy)


def test_a_graph_of_somebody_else(graph_copy: Path) -> None:
    manifest_of(graph_copy).unlink()
    model = onnx.load(graph_copy)
    del model.metadata_props[:]
    onnx.save(model, graph_copy)
    with pytest.raises(EngineError, match=r"was not written by sws-export.*put SWS into it with"):
        Session.load(graph_copy)


def test_a_damaged_graph(graph_copy: Path) -> None:
    graph_copy.write_bytes(b"\xff" * graph_copy.stat().st_size)
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot load .*sws\.onnx"):
        Session.load(graph_copy, verify=False)
    manifest_of(graph_copy).unlink()
    with pytest.raises(EngineError, match="is not an ONNX model or is damaged"):
        Session.load(graph_copy)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such file; make it with: sws-export"):
        Session.load(tmp_path / "engine.plan")
    with pytest.raises(EngineError, match="File name too long"):
        Session.load(tmp_path / ("a" * 300 + ".plan"))
    with pytest.raises(EngineError, match=r"expected \.onnx, \.plan or \.engine, found '\.bin'"):
        Session.load(tmp_path / "engine.bin")


@pytest.fixture
def plan_of(sws_graph: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A TensorRT for RTX plan whose manifest says that `backend` built it."""

    def make(backend: str) -> Path:
        plan = make_plan(tmp_path / "engine.plan")
        document = json.loads(manifest_of(sws_graph).read_text())
        entry = {"name": plan.name, "bytes": 64, "sha256": hashlib.sha256(plan.read_bytes()).hexdigest()}
        document |= {
            "artefact": plan.name,
            "files": [entry],
            "engine": {"backend": backend},
            "target": "tensorrt-rtx",
        }
        manifest_of(plan).write_text(json.dumps(document))
        return plan

    return make


def test_an_engine_of_another_library(plan_of: Callable[[str], Path]) -> None:
    with pytest.raises(EngineError, match="is an engine of tensorrt-rtx, its manifest is of tensorrt"):
        Session.load(plan_of("tensorrt"))


def test_an_engine_of_another_target(plan_of: Callable[[str], Path]) -> None:
    plan = plan_of("tensorrt-rtx")
    document = json.loads(manifest_of(plan).read_text()) | {"target": "tensorrt"}
    manifest_of(plan).write_text(json.dumps(document))
    with pytest.raises(EngineError, match="engine of tensorrt-rtx, its manifest has the target tensorrt:"):
        Session.load(plan)


def test_engines_do_not_run_on_the_cpu(plan_of: Callable[[str], Path]) -> None:
    with pytest.raises(OptionError, match=r"runs on a GPU only; on the CPU load the \.onnx graph"):
        Session.load(plan_of("tensorrt-rtx"), device="cpu")


@pytest.mark.parametrize("option", [{"provider": "cuda"}, {"threads": 2}])
def test_options_of_graphs_are_rejected_for_engines(
    plan_of: Callable[[str], Path], option: dict[str, Any]
) -> None:
    ((name, value),) = option.items()
    with pytest.raises(OptionError, match=rf"{name}={value!r} is for \.onnx graphs; .* runs in tensorrt-rtx"):
        Session.load(plan_of("tensorrt-rtx"), **option)


def test_engines_need_a_driver(plan_of: Callable[[str], Path]) -> None:
    if gpu_count():
        pytest.skip("this machine has a GPU")
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EngineError, match=r"need an NVIDIA GPU with its driver, and none was found.*\.onnx"):
        Session.load(plan_of("tensorrt-rtx"))


def test_a_plan_cut_short(plan_of: Callable[[str], Path]) -> None:
    plan = plan_of("tensorrt-rtx")
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(EngineError, match="its size is 63 bytes, expected 64 bytes"):
        Session.load(plan)

"""`inspect` on each kind of file."""

import json
import shutil
from pathlib import Path

import onnx_ir as ir
import pytest

from sws_export.errors import SwsExportError
from sws_export.inspection import inspect_file
from sws_export.manifest import read_manifest
from tests.sws_export.runtime.test_contract import make_plan


def test_a_checkpoint(random_unet: Path) -> None:
    for path in (random_unet, random_unet / "diffusion_pytorch_model.safetensors"):
        facts = inspect_file(path)
        assert facts["kind"] == "checkpoint"
        assert facts["layout"] == "diffusers"
        assert 500_000 < facts["parameters"] < 2_000_000
        assert facts["config"]["cross_attention_dim"] == 16


def test_a_graph_with_a_manifest(traced: Path) -> None:
    facts = inspect_file(traced)
    assert facts["kind"] == "onnx"
    assert facts["opset"] == 23
    assert facts["producer"].startswith("sws-export ")
    assert facts["inputs"][0] == "sample float32 ['batch', 4, 'height', 'width']"
    assert facts["precision"] == "fp32"
    assert facts["sws"] is None
    assert "warnings" not in facts


def test_a_graph_without_a_manifest(traced: Path, tmp_path: Path) -> None:
    model = ir.load(traced)
    model.metadata_props.clear()
    ir.save(model, tmp_path / "g.onnx")
    facts = inspect_file(tmp_path / "g.onnx")
    assert {grid: len(names) for grid, names in facts["sites"].items()} == {"d2": 4, "text": 4}
    assert facts["sites"]["d2"][0] == "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    assert facts["sites"]["text"][0] == "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    assert facts["skipped_sites"] == []


def test_a_manifest_of_another_artefact(sws_graph: Path, traced: Path, tmp_path: Path) -> None:
    """Also where the other artefact has the same name and files."""
    graph, manifest = tmp_path / "sws.onnx", tmp_path / "sws.onnx.json"
    shutil.copy(sws_graph, graph)
    assert inspect_file(graph)["warnings"] == [
        "sws.onnx.json is missing: the graph cannot be loaded for running without it"
    ]
    shutil.copy(f"{traced}.json", manifest)
    for file in (graph, manifest):
        (warning,) = inspect_file(file)["warnings"]
        assert "sws.onnx is not the file that sws.onnx.json was written for" in warning
    document = json.loads(Path(f"{sws_graph}.json").read_text())
    manifest.write_text(json.dumps(document | {"sws": {"beta": 0.5}}))
    for file in (graph, manifest):
        (warning,) = inspect_file(file)["warnings"]
        assert "is not the manifest of sws.onnx: they differ in 'sws'" in warning


def test_the_gpu_memory_of_an_engine(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "e.plan")
    recorded = Path(__file__).parent / "manifest" / "recorded" / "format_1_sws.json"
    profile = {"activations": 2 * 10**9, "scratch": 10**9, "states": 10**6, "later": 1}
    engine = {"backend": "tensorrt-rtx", "gpu_memory": {"weights": 10**9, "profiles": [profile]}}
    document = json.loads(recorded.read_text()) | {"engine": engine}
    Path(f"{plan}.json").write_text(json.dumps(document))
    assert inspect_file(plan)["gpu_memory"] == [
        "needs 3.00 GB of GPU memory: weights 1.00 GB, activations 2.00 GB, states 1.00 MB"
    ]
    Path(f"{plan}.json").write_text(json.dumps(document | {"engine": {"backend": "tensorrt-rtx"}}))
    assert "gpu_memory" not in inspect_file(plan)


def test_a_manifest(tmp_path: Path) -> None:
    recorded = Path(__file__).parent / "manifest" / "recorded" / "format_1_sws.json"
    warning = [f"{recorded.with_suffix('')}: expected .onnx, .plan or .engine, found ''"]
    assert inspect_file(recorded) == {"kind": "manifest", **read_manifest(recorded), "warnings": warning}
    (tmp_path / "e.plan.json").write_text(json.dumps({"artefact": "e.plan", "precision": "fp16"}))
    with pytest.raises(SwsExportError, match=r"e\.plan\.json has format null"):
        inspect_file(tmp_path / "e.plan.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("g.onnx", b"no graph"),
        ("e.plan", b"no plan"),
        ("e.engine", b""),
        ("m.json", b"{}"),
        ("m.json", b"[1]"),
        ("m.json", b"12"),
        ("m.json", b"{"),
        ("m.json", b"\xff\xfe"),
        ("m.txt", b"text"),
        ("m.safetensors", b"123"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SwsExportError, match=str(tmp_path / name)):
        inspect_file(tmp_path / name)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SwsExportError, match="absent: no such file or directory"):
        inspect_file(tmp_path / "absent")

"""The command as a user runs it, on the trained example and a small random UNet."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import psutil
import pytest
from sws_export.cli import main

from sws_export import ExportOptions, export
from tests.export_runs import COMMAND, ONE_SITE, ROOT, TRAINED, error_line, listing

SWS_NAMES = {
    *("sigma_min", "sigma_max", "tau", "sinkhorn_iters", "rebalance_iters", "beta", "bisection_steps"),
    *("key_cap", "value_cap", "u_stop", "kl_floor", "kl_slope", "theta", "scales", "schedule"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained example as a pipeline directory, in another place than the repository."""
    directory = tmp_path_factory.mktemp("trained")
    shutil.copytree(TRAINED, directory / "unet")
    return directory


@pytest.fixture(scope="module")
def made(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An engine of the example, exported by the command: its directory and what `--json` printed.

    With SWS at three of seven sites, so that it builds in half the time.
    """
    directory = tmp_path_factory.mktemp("made")
    command = [str(trained), "--out", str(directory / "shapes.plan"), "--tokens", "1:8:8", "--batch", "1:2:4"]
    command += ["--height", "32:32:64", "--width", "32:32:64", "--vae-scale", "1"]
    command += ["--sites", "down_blocks.*.attn1", "--sites", "mid_block.*.attn1"]
    command += ["--keep-onnx", "--json", "--compute-capability", "12.0", "--builder-optimization-level", "0"]
    printed, log = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(log):
        assert main(command) == 0
    assert "wrote" in log.getvalue()
    return directory, json.loads(printed.getvalue())


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_engine_graph_and_manifest_are_written(made: tuple[Path, dict[str, Any]]) -> None:
    directory, printed = made
    assert sorted(listing(directory)) == [
        "shapes.onnx",
        "shapes.onnx.json",
        "shapes.plan",
        "shapes.plan.json",
    ]
    assert printed["files"][0] == str(directory / "shapes.plan")
    assert sorted(printed["files"]) == sorted(str(directory / name) for name in listing(directory))
    assert printed["manifest"] == json.loads((directory / "shapes.plan.json").read_text())


def test_the_manifest_describes_inputs_states_and_profile(made: tuple[Path, dict[str, Any]]) -> None:
    _, printed = made
    manifest = printed["manifest"]
    shapes = {spec["name"]: (spec["dtype"], spec["shape"]) for spec in manifest["inputs"]}
    assert shapes == {
        "sample": ("float16", ["batch", 3, "height", "width"]),
        "timestep": ("float32", ["batch"]),
        "encoder_hidden_states": ("float16", ["batch", "tokens", 64]),
        "sigma": ("float32", ["batch"]),
        "intensity": ("float32", ["batch"]),
        "sws_state_d2": ("float32", ["batch", 145, "height/2", "width/2"]),
        "sws_state_d4": ("float32", ["batch", 145, "height/4", "width/4"]),
    }
    assert [spec["name"] for spec in manifest["outputs"]] == [
        "out_sample",
        "sws_state_d2_out",
        "sws_state_d4_out",
    ]
    assert [(pair["input"], pair["output"]) for pair in manifest["states"]] == [
        ("sws_state_d2", "sws_state_d2_out"),
        ("sws_state_d4", "sws_state_d4_out"),
    ]
    assert manifest["profiles"][0]["sample"] == {
        "min": [1, 3, 32, 32],
        "opt": [2, 3, 32, 32],
        "max": [4, 3, 64, 64],
    }
    assert manifest["profiles"][0]["encoder_hidden_states"]["min"] == [1, 1, 64]
    assert manifest["profiles"][0]["sws_state_d4"]["max"] == [4, 145, 16, 16]
    assert manifest["profiles"][0].keys() == shapes.keys()


def test_the_manifest_describes_the_source(made: tuple[Path, dict[str, Any]], trained: Path) -> None:
    _, printed = made
    manifest = printed["manifest"]
    assert manifest["sws"].keys() == SWS_NAMES
    assert {grid: len(names) for grid, names in manifest["sites"].items()} == {"d2": 1, "d4": 2}
    assert manifest["precision"] == "fp16"
    assert manifest["opset"] == 23
    assert {"torch", "onnx", "diffusers", "sws-export"} <= manifest["versions"].keys()
    assert manifest["source"]["sha256"] == sha256(trained / "unet" / "diffusion_pytorch_model.safetensors")
    assert manifest["source"]["config"]["block_out_channels"] == [32, 64, 96]
    assert manifest["engine"]["compute_capabilities"] == ["12.0"]
    validation = manifest["validation"]
    assert validation["passed"] is True
    assert validation["steps"] == 5
    assert validation["sizes"]["height"] != validation["sizes"]["width"]
    assert [output["name"] for output in validation["outputs"]] == [
        "out_sample",
        "sws_state_d2_out",
        "sws_state_d4_out",
    ]
    for output in validation["outputs"]:
        assert 0 <= output["mean"] <= output["quantile"] <= output["maximum"] <= output["tolerance"]


def test_the_graph_has_standard_operators_and_its_manifest(made: tuple[Path, dict[str, Any]]) -> None:
    directory, printed = made
    model = ir.load(directory / "shapes.onnx")
    # The attention that TensorRT for RTX has an operator of its own for is a function for all others.
    assert [identifier[1] for identifier in model.functions] == ["TRT_Attention"]
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    assert {node.op_type for node in nodes if node.domain} == {"TRT_Attention"}
    operators = Counter(node.op_type for node in nodes)
    assert operators.keys().isdisjoint({"Loop", "If", "Scan"})
    # Those of the UNet, and four of the guard at the site with more than 256 tokens.
    assert operators["Attention"] + operators["TRT_Attention"] == 14 + 4
    described = json.loads(model.metadata_props["sws_export.manifest"])
    assert described == {name: printed["manifest"][name] for name in described}
    # Nothing of the machine: the same input gives the same bytes.
    assert str(ROOT).encode() not in (directory / "shapes.onnx").read_bytes()


def test_inspect_describes_the_artefacts(
    made: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, printed = made
    for name, kind in (("shapes.plan", "engine"), ("shapes.onnx", "onnx"), ("shapes.plan.json", "manifest")):
        assert main(["inspect", str(directory / name), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["kind"] == kind
        assert facts["sites"] == printed["manifest"]["sites"]
        assert facts["states"] == printed["manifest"]["states"]


def test_validate_compares_again(
    made: tuple[Path, dict[str, Any]], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = made
    assert main(["validate", str(directory / "shapes.onnx"), str(trained / "unet"), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["passed"] is True
    assert "sws_state_d4_out" in printed.err


def test_two_processes_write_the_same_bytes(traced: Path, tmp_path: Path) -> None:
    """From a plain graph; traces of two processes are compared in `test_export_unet.py`."""
    command = [COMMAND, traced, "--out", tmp_path / "a.onnx", "--quiet", "--no-validate"]
    command += ["--sites", *ONE_SITE.sites, "--guard", "literal"]
    subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "1"}, check=True, timeout=500)
    export(traced, tmp_path / "b.onnx", ExportOptions(sws=ONE_SITE, validate=False))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def interrupt(command: list[Any], when: str, number: signal.Signals) -> tuple[int, str]:
    """Start the command, signal it once it prints `when`, check that its children end; exit code, stderr."""
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stderr is not None
        while when not in process.stderr.readline():
            assert process.poll() is None
        while when == "engine (" and not psutil.Process(process.pid).children():
            time.sleep(0.01)
        time.sleep(0.2)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        _, printed = process.communicate(timeout=60)
    assert not psutil.wait_procs(children, timeout=10)[1]
    return process.returncode, printed


@pytest.mark.slow
def test_an_interrupt_during_the_export(random_unet: Path, tmp_path: Path) -> None:
    command = [COMMAND, random_unet, "--out", tmp_path / "graph.onnx"]
    code, printed = interrupt(command, "export …", signal.SIGINT)
    assert code == 1
    assert error_line(printed) == "interrupted; nothing was written"
    assert listing(tmp_path) == {}


def test_termination_during_the_engine_build(traced: Path, tmp_path: Path) -> None:
    command = [COMMAND, traced, "--out", tmp_path / "engine.plan", "--no-validate", "--keep-onnx"]
    command += ["--sites", *ONE_SITE.sites, "--vae-scale", "1", "--height", "16:32:64", "--width", "16:32:64"]
    code, printed = interrupt(command, "engine (", signal.SIGTERM)
    assert code == 1
    assert error_line(printed) == "interrupted; nothing was written"
    assert listing(tmp_path) == {}


def test_quiet_prints_nothing(traced: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The libraries that it loads are silent too."""
    assert main([str(traced), "--out", str(tmp_path / "graph.onnx"), "--quiet", "--guard", "literal"]) == 0
    assert capfd.readouterr() == ("", "")

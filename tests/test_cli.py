"""The command line itself: options, where output goes, exit codes."""

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rich.table
from sws_export.cli import main

from sws_export import EngineOptions, ExportOptions, SizeOptions, SourceOptions, SwsOptions, SwsParameters
from sws_export.commands.shared import EscapedLog
from tests.export_runs import COMMAND, ROOT, error_line

RECORDED = ROOT / "tests" / "sws_export" / "manifest" / "recorded" / "format_1_sws.json"
MANIFEST = json.loads(RECORDED.read_text("utf-8"))

QUICK = ["--sites", "mid_block.*.attn1", "--guard", "literal", "--no-validate"]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """The command sets a handler for SIGTERM, which is not for the other tests."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def parsed(*arguments: str) -> ExportOptions:
    parser = argparse.ArgumentParser()
    ExportOptions.add_arguments(parser)
    return ExportOptions.from_arguments(parser.parse_args(arguments))


def test_options_of_the_library() -> None:
    arguments = ["--precision", "fp16", "--sws", "beta=0.7", "scales=1,2,4", "--sws", "schedule=noise"]
    arguments += ["--sites", "up_blocks.*", "--sites", "mid*", "--config", "c.json", "--ema"]
    arguments += ["--variant", "fp16", "--attention-head-dim", "5,10", "--prediction-type", "v_prediction"]
    arguments += ["--vae-scale", "8", "--batch", "1:2:4", "--height", "256:512:1024", "--width", "512"]
    arguments += ["--profile", "batch=2", "--profile", "batch=4", "--max-gpu-memory", "8GB"]
    arguments += ["--tokens", "77", "--backend", "tensorrt-rtx", "--compute-capability", "8.9,12.0"]
    arguments += ["--builder-optimization-level", "2", "--no-validate", "--keep-onnx", "--dry-run"]
    assert parsed(*arguments) == ExportOptions(
        source=SourceOptions(
            precision="fp16",
            config=Path("c.json"),
            ema=True,
            variant="fp16",
            attention_head_dim=(5, 10),
            prediction_type="v_prediction",
        ),
        sws=SwsOptions(
            parameters=SwsParameters(beta=0.7, scales=(1, 2, 4), schedule="noise"),
            sites=("up_blocks.*", "mid*"),
        ),
        sizes=SizeOptions(
            vae_scale=8,
            batch="1:2:4",
            height="256:512:1024",
            width="512",
            tokens="77",
            profiles=("batch=2", "batch=4"),
        ),
        engine=EngineOptions(
            compute_capabilities=("8.9", "12.0"), optimization_level=2, max_gpu_memory="8GB"
        ),
        backend="tensorrt-rtx",
        validate=False,
        keep_onnx=True,
        dry_run=True,
    )


def test_defaults_are_those_of_the_library() -> None:
    assert parsed() == ExportOptions()


@pytest.mark.parametrize(
    ("options", "remarks", "summary"),
    [((), True, True), (("--quiet",), False, False), (("--json",), True, True)],
)
def test_where_output_goes(
    traced: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    remarks: bool,
    summary: bool,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    assert main([str(traced), "--out", str(tmp_path / "g.onnx"), *QUICK, *options]) == 0
    out, err = capsys.readouterr()
    assert "warning: about 0.0 GB of disk are needed" in err
    assert ("plain ONNX graph" in err) == remarks
    assert ("wrote" in err) == summary
    if "--json" in options:
        printed = json.loads(out)
        assert printed["files"] == [str(tmp_path / "g.onnx"), str(tmp_path / "g.onnx.json")]
        assert printed["preflight"]["free_disk"] == 1000
        assert printed["manifest"]["artefact"] == "g.onnx"
    else:
        assert out == ""


def test_an_error_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "m.safetensors"
    assert main([str(model), "--out", str(tmp_path / "g.onnx")]) == 1
    assert error_line(capsys.readouterr().err).startswith(f"{model} does not exist")


def test_a_message_of_several_lines_becomes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Libraries break their messages into lines, and we quote them."""
    model = tmp_path / "damaged: line 1\n  ^ here.safetensors"
    assert main([str(model), "--out", str(tmp_path / "g.onnx"), "--quiet"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"sws-export: {tmp_path}/damaged: line 1 ^ here.safetensors does not exist")
    assert printed.count("\n") == 1


def test_a_python_warning_is_one_line(
    traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)

    def warn(_: object) -> Any:
        warnings.simplefilter("default")
        warnings.warn("the target is\nanother one", RuntimeWarning, stacklevel=1)
        return usage

    monkeypatch.setattr("shutil.disk_usage", warn)
    assert main([str(traced), "--out", str(tmp_path / "g.onnx"), "--dry-run", "--quiet"]) == 0
    assert capsys.readouterr().err == "warning: the target is another one\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_with_one_line(
    traced: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: signal.raise_signal(number))
    assert main([str(traced), "--out", str(tmp_path / "g.onnx")]) == 1
    assert error_line(capsys.readouterr().err) == "interrupted; nothing was written"


def test_an_interrupt_during_the_summary_lists_what_is_complete(
    traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The summary has a table of the stages."""
    out = tmp_path / "g.onnx"
    monkeypatch.setattr(rich.table.Table, "add_row", lambda *_: signal.raise_signal(signal.SIGINT))
    assert main([str(traced), "--out", str(out), *QUICK]) == 1
    assert error_line(capsys.readouterr().err) == f"interrupted; complete: {out}, {out}.json"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unet"],
        ["--out", "g.onnx"],
        ["unet", "--out", "g.onnx", "--precision", "int4"],
        ["unet", "--out", "g.onnx", "--no-such-option"],
        ["unet", "--out", "g.onnx", "--attention-head-dim", "five"],
        ["inspect"],
        ["validate", "g.onnx"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: sws-export" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["inspect"], ["validate"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert f"usage: {' '.join(['sws-export', *command])}" in capsys.readouterr().out


def test_inspect_prints_facts_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tmp_path / "e.plan.json"
    manifest.write_text(json.dumps(MANIFEST | {"sites": {"d2": ["a", "b"]}}))
    assert main(["inspect", str(manifest)]) == 0
    printed = capsys.readouterr().out
    assert "kind: manifest\n" in printed
    assert "precision: fp32\n" in printed
    assert main(["inspect", str(manifest), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"] == {"d2": ["a", "b"]}


def test_inspect_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "absent")]) == 1
    assert error_line(capsys.readouterr().err) == f"{tmp_path}/absent: no such file or directory"


def test_a_reader_that_has_enough(tmp_path: Path) -> None:
    manifest = tmp_path / "e.plan.json"
    manifest.write_text(json.dumps(MANIFEST | {"sites": {"d2": ["a" * 200] * 5000}}))
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [COMMAND, "inspect", manifest], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 1


def test_compute_capabilities_are_split_and_not_repeated() -> None:
    found = parsed("--compute-capability", "8.9, 12.0,8.9")
    assert found.engine.compute_capabilities == ("8.9", "12.0")


def test_control_characters_in_logs_of_libraries_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    EscapedLog().emit(logging.makeLogRecord({"msg": "Input '\x1b[31mz'"}))
    assert capsys.readouterr().err == "Input '\\x1b[31mz'\n"

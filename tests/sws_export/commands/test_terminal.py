"""Terminal output: progress, summaries, tables, nested values."""

import dataclasses
import errno
import io
from pathlib import Path

import pytest
from rich.console import Console
from sws_export.cli import main

from sws_export.commands.shared import print_json, print_values, printable
from sws_export.commands.terminal import (
    QuietProgress,
    TerminalProgress,
    print_export,
    print_validation,
)
from sws_export.engines.build import EngineReport
from sws_export.engines.gpu_memory import GpuMemory, ProfileMemory
from sws_export.pipeline.preflight import Preflight
from sws_export.pipeline.run import ExportReport
from sws_export.stage_timings import StageTiming
from sws_export.validation import OutputDifference, ValidationReport

PREFLIGHT = Preflight(memory={"export": 1}, disk=2, graph_size=2, available_memory=3, free_disk=4)
VALIDATION = ValidationReport(
    reference="eager reference in float64",
    remarks=("a remark [with brackets]",),
    steps=5,
    sizes={"batch": 2, "height": 16, "width": 12, "tokens": 7},
    outputs=(
        OutputDifference("out_sample", 1e-3, 1e-5, 1e-4, 2e-4),
        OutputDifference("sws_state_d2_out", 1e-7, 1e-9, 1e-8, 1e-5),
    ),
    seconds=3.2,
)


def console(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False, soft_wrap=True)


def text(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(terminal: bool) -> None:
    progress = TerminalProgress(console(terminal=terminal))
    with progress.stage("check weights", total=2) as stage:
        stage.describe("a name [/] in brackets")
        stage.advance()
    progress.log("model [/weird].safetensors")
    progress.warn("no room [left]")
    output = text(progress.console)
    assert ("check weights …" in output) == (not terminal)
    assert "model [/weird].safetensors" in output
    assert "warning: no room [left]" in output


def test_only_slow_stages_show_their_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = TerminalProgress(console())
    clock = iter([0.0, 0.5, 10.0, 12.5])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    for name in ("fast", "slow"):
        with progress.stage(name):
            pass
    assert text(progress.console) == "fast …\nslow …\n✓ slow 2.5 s\n"


def test_a_failed_stage_shows_no_duration() -> None:
    progress = TerminalProgress(console())
    with pytest.raises(KeyError), progress.stage("export"):
        raise KeyError
    assert text(progress.console) == "export …\n"


def test_quiet_progress_shows_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    progress = QuietProgress()
    with progress.stage("export", total=3) as stage:
        stage.advance()
        stage.describe("tracing")
    progress.log("a remark")
    progress.warn("a warning")
    assert capsys.readouterr() == ("", "warning: a warning\n")


def test_the_table_of_a_validation() -> None:
    shown = console()
    print_validation(shown, VALIDATION)
    output = text(shown)
    assert "compared with the eager reference in float64: 5 steps, batch 2, latent 16 x 12, 3 s" in output
    first, second = (line.split() for line in output.splitlines() if "e-0" in line)
    assert first == ["out_sample", "1.0e-03", "1.0e-05", "1.0e-04", "2.0e-04", "failed"]
    assert second == ["sws_state_d2_out", "1.0e-07", "1.0e-09", "1.0e-08", "1.0e-05", "passed"]
    assert "note: a remark [with brackets]" in output


def test_the_summary_of_an_export(tmp_path: Path) -> None:
    file = tmp_path / "graph [1].onnx"
    file.write_bytes(b"x" * 1_500_000)
    stages = (StageTiming("export", 22.61, 630_000_000),)
    state = {"input": "sws_state_d2", "output": "sws_state_d2_out"}
    shown = console()
    print_export(
        shown,
        ExportReport((file,), {"states": [state]}, "fp16, as given", PREFLIGHT, VALIDATION, None, stages),
    )
    output = text(shown)
    assert "out_sample" in output
    assert "22.6" in output
    assert "0.63 GB" in output
    assert "precision: fp16, as given" in output
    assert f"wrote {file}  1.50 MB" in output
    assert "after each step feed back sws_state_d2_out -> sws_state_d2" in output


def test_the_summary_of_an_engine_with_two_profiles() -> None:
    memory = GpuMemory(10**9, (ProfileMemory(10**8, 0, 10**6), ProfileMemory(2 * 10**9, 0, 10**6)))
    engine = EngineReport(
        "tensorrt-rtx", "1.7", ("8.9",), 4, 1.0, 0.5, 0.5, 10**6, 3, 0, {}, gpu_memory=memory
    )
    planned = dataclasses.replace(PREFLIGHT, profiles=("batch 2", "batch 4"))
    shown = console()
    print_export(shown, ExportReport((), {"states": []}, "fp16", planned, None, engine, ()))
    assert text(shown).splitlines() == [
        "precision: fp16",
        "needs 1.10 GB of GPU memory: weights 1.00 GB, activations 100.00 MB, states 1.00 MB, for batch 2",
        "needs 3.00 GB of GPU memory: weights 1.00 GB, activations 2.00 GB, states 1.00 MB, for batch 4",
    ]
    shown = console()
    unknown = dataclasses.replace(engine, gpu_memory=None)
    print_export(shown, ExportReport((), {"states": []}, "fp16", planned, None, unknown, ()))
    assert "unknown amount of GPU memory" in text(shown)


def test_the_summary_of_a_dry_run() -> None:
    shown = console()
    print_export(shown, ExportReport((), None, "fp16", PREFLIGHT, None, None, ()))
    assert text(shown) == "precision: fp16\ndry run: nothing was written\n"


def test_nested_values(capsys: pytest.CaptureFixture[str]) -> None:
    print_values(
        {
            "kind": "engine",
            "family": None,
            "sites": {"d2": ["a", "b"], "d4": []},
            "shape": [1, 4, 8],
            "states": [{"input": "s", "output": "s_out"}],
        }
    )
    assert capsys.readouterr().out == (
        "kind: engine\n"
        "family: unknown\n"
        "sites:\n"
        "  d2:\n"
        "    a\n"
        "    b\n"
        "  d4: none\n"
        "shape: 1 4 8\n"
        "states:\n"
        "  input s, output s_out\n"
    )


HOSTILE = "a\x1b[2J\x9b31mb\r\n\x07c\u202ed\udcffe\x7f"


def test_control_characters_are_escaped() -> None:
    assert printable(HOSTILE) == r"a\x1b[2J\x9b31mb\r\n\x07c\u202ed\udcffe\x7f"
    assert printable("Größe 512 × 512 → β … 🙂") == "Größe 512 × 512 → β … 🙂"


def test_no_control_character_of_a_file_reaches_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    print_values({HOSTILE: {HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]}, "b": HOSTILE})
    print_json({HOSTILE: HOSTILE})
    shown = console()
    progress = TerminalProgress(shown)
    progress.log(HOSTILE)
    progress.warn(HOSTILE)
    with progress.stage("open") as stage:
        stage.describe(HOSTILE)
    difference = dataclasses.replace(VALIDATION.outputs[0], name=HOSTILE)
    print_validation(shown, dataclasses.replace(VALIDATION, outputs=(difference,), remarks=(HOSTILE,)))
    printed = capfd.readouterr().out + text(shown)
    assert all(letter.isprintable() or letter == "\n" for letter in printed)
    assert printed.count(r"\x1b[2J") >= 6


def test_the_error_line_has_no_control_characters(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / f"no{HOSTILE}.onnx")]) == 1
    printed = capfd.readouterr().err
    assert printed.endswith("no such file or directory\n")
    assert all(letter.isprintable() for letter in printed[:-1])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/models/unet"),
            "/models/unet: Permission denied",
        ),
        (
            OSError(errno.EMFILE, "Too many open files"),
            "this process: Too many open files; raise the limit with",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300), "aaa: File name too long"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_limits_of_the_machine_end_in_one_line(
    error: OSError,
    line: str,
    wrapped: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        if wrapped:
            raise RuntimeError("a library failed") from error
        raise error

    monkeypatch.setattr(Path, "exists", fail)
    assert main(["inspect", "x"]) == 1
    printed = capfd.readouterr().err
    assert line in printed
    assert printed.count("\n") == 1


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug") from OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(Path, "exists", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["inspect", "x"])

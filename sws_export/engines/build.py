"""Building an engine in a process of its own, and telling what became of it."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from sws_export import errors
from sws_export.engines.backend import BuildOptions
from sws_export.engines.events import EventReader
from sws_export.engines.header import plan_header
from sws_export.engines.memory import OUT_OF_MEMORY_ADVICE, is_out_of_memory
from sws_export.errors import EngineError
from sws_export.progress import Progress, SilentProgress, Stage
from sws_export.stage_timings import peak_memory
from sws_export.tensors import Shapes

_POLL_SECONDS = 0.5
"""How often the memory of the child is looked at."""
_SHOWN_WARNINGS = 5


@dataclass(frozen=True)
class EngineReport:
    """An engine that was built."""

    backend: str
    library_version: str
    compute_capabilities: tuple[str, ...]
    """Targets; empty: the GPU of the machine that built it."""
    size: int
    """Bytes of the plan."""
    seconds: float
    """Wall time from the start of the process to the complete plan."""
    parse_seconds: float
    build_seconds: float
    peak_memory: int
    """Largest resident memory of the build process in bytes."""
    layers: int
    decomposed_attentions: int
    """Attention layers that TensorRT may build of several kernels, having none for them."""
    warnings: dict[str, int]
    """Each warning of the library, and error that did not stop it, and how often it came."""


@dataclass
class Outcome:
    """What has been heard from the child so far."""

    built: dict[str, Any] | None = None
    failure: Exception | None = None
    first_error: str = ""
    complaints: dict[str, int] = field(default_factory=dict)
    phase: str = "starting"
    peak_memory: int = 0


def build_engine(
    onnx_path: Path,
    out_path: Path,
    shapes: Shapes,
    options: BuildOptions,
    progress: Progress | None = None,
) -> EngineReport:
    """Build an engine from the graph at `onnx_path` and write its plan to `out_path`.

    The work is done in a child process, which ends with this one and is ended when this function is
    interrupted. Unless it returns, there is no file at `out_path`. To replace an engine in one step, give
    a path beside it and move the file.

    Args:
        onnx_path: The graph; its external data lies where the file says.
        out_path: Where the plan goes; an existing file is overwritten.
        shapes: Smallest, best and largest shape of each input, see `sws_export.profile.shapes_for`.
        options: Backend and how to build.
        progress: Hears of phases and warnings.

    Raises:
        EngineError: The backend refused the graph, failed, died or was killed.
        OptionError: The shapes do not fit the graph.
        OSError: The plan cannot be written to `out_path`.
    """
    progress = progress or SilentProgress()
    spec = {
        "parent": os.getpid(),
        "onnx": str(onnx_path.resolve()),
        "out": str(out_path.resolve()),
        "shapes": shapes,
        "options": options.to_json(),
    }
    started = time.monotonic()
    outcome = Outcome()
    complete = False
    try:
        with progress.stage(f"engine ({options.backend.name})") as stage, tempfile.TemporaryFile() as output:
            with _child(spec, output) as (child, reader):
                _listen(child, reader, outcome, stage)
            output.seek(0)
            printed = output.read().decode(errors="replace")
        raise_failure(child.returncode, outcome, printed, options)
        report = _report(outcome, out_path, options, time.monotonic() - started)
        complete = True
    finally:
        if not complete:
            out_path.unlink(missing_ok=True)
    log_warnings(report, progress)
    return report


@contextlib.contextmanager
def _child(spec: dict[str, Any], output: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], EventReader]]:
    """The running child and the pipe of its events; it is gone when the block is left."""
    reading, writing = os.pipe()
    try:
        child = subprocess.Popen(
            # -P and the path of this process: the child imports what this process would, wherever it runs.
            [sys.executable, "-P", "-m", "sws_export.engines.child", str(writing)],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            # Ctrl-C is for this process, which ends the child.
            process_group=0,
        )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    try:
        assert child.stdin is not None
        # A child that died at once is told of by its exit status.
        with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
            stdin.write(json.dumps(spec).encode())
        yield child, EventReader(reading)
    finally:
        child.kill()
        child.wait()
        os.close(reading)


def _listen(child: subprocess.Popen[bytes], reader: EventReader, outcome: Outcome, stage: Stage) -> None:
    """Take in what the child tells until it has ended."""
    while True:
        readable, _, _ = select.select([reader.descriptor], [], [], _POLL_SECONDS)
        outcome.peak_memory = max(outcome.peak_memory, peak_memory(child.pid))
        if readable:
            events = reader.read()
            if events is None:
                break
            for event in events:
                _take(event, outcome)
                # Every phase is told of, also one that is over by now.
                stage.describe(_progress_text(outcome))
        stage.describe(_progress_text(outcome))
    child.wait()


def _progress_text(outcome: Outcome) -> str:
    return f"{outcome.phase}, {outcome.peak_memory / 1e9:.1f} GB"


def _take(event: dict[str, Any], outcome: Outcome) -> None:
    match event["event"]:
        case "phase":
            outcome.phase = event["text"]
        case "log":
            text = event["text"]
            outcome.complaints[text] = outcome.complaints.get(text, 0) + 1
            if event["severity"] == "error":
                outcome.first_error = outcome.first_error or text
        case "failed":
            outcome.failure = getattr(errors, event["error"])(event["message"])
        case "not_written":
            outcome.failure = OSError(event["errno"], os.strerror(event["errno"]), event["path"])
        case "built":
            outcome.built = event
            outcome.peak_memory = max(outcome.peak_memory, event["peak_memory"])


def raise_failure(code: int, outcome: Outcome, printed: str, options: BuildOptions) -> None:
    """Raise what the end of the child means, from its exit status, events and other output.

    Raises:
        EngineError: It was killed or died, or told so.
        OptionError: It told so.
        OSError: It could not write the plan.
        RuntimeError: It has a bug.
    """
    if code == 0 and outcome.built is not None:
        return
    if outcome.failure is not None:
        raise outcome.failure
    if code < 0:
        raise EngineError(_death(-code, outcome, printed, options))
    # Not an error of the library: our own child process has a bug.
    raise RuntimeError(f"the engine build process ended with status {code}:\n{printed}")


def _death(number: int, outcome: Outcome, printed: str, options: BuildOptions) -> str:
    name = signal.Signals(number).name
    total = psutil.virtual_memory().total
    memory = f"at {outcome.peak_memory / 1e9:.1f} of {total / 1e9:.1f} GB of memory"
    said = outcome.first_error or (printed.strip().splitlines() or [""])[-1].strip()
    said = f"; last output: {said}" if said else ""
    process = f"the {options.backend.name} build process"
    what = f"{process} was ended by {name} in phase {outcome.phase!r}, {memory}{said}"
    if number == signal.SIGKILL or is_out_of_memory(said):
        return f"{what}; most likely memory ran out: {OUT_OF_MEMORY_ADVICE}"
    return f"{what}; this is a fault of the library: try another version of it, or report the graph to NVIDIA"


def _report(outcome: Outcome, out_path: Path, options: BuildOptions, seconds: float) -> EngineReport:
    built = outcome.built
    assert built is not None
    header = plan_header(out_path)
    return EngineReport(
        backend=options.backend.name,
        library_version=built["library_version"],
        compute_capabilities=header.compute_capabilities,
        size=out_path.stat().st_size,
        seconds=seconds,
        parse_seconds=built["parse_seconds"],
        build_seconds=built["build_seconds"],
        peak_memory=outcome.peak_memory,
        layers=built["layers"],
        decomposed_attentions=built["decomposed_attentions"],
        warnings=outcome.complaints,
    )


def log_warnings(report: EngineReport, progress: Progress) -> None:
    """Say what the library warned of, the first few of it."""
    for text, count in list(report.warnings.items())[:_SHOWN_WARNINGS]:
        progress.warn(f"{report.backend}: {text}" + (f" ({count} times)" if count > 1 else ""))
    if len(report.warnings) > _SHOWN_WARNINGS:
        progress.warn(
            f"{report.backend}: {len(report.warnings) - _SHOWN_WARNINGS} more warnings, see the manifest"
        )

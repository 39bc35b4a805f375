"""Builds an engine in a child process and reports the result."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from sws_export import errors
from sws_export.engines.backend import BuildOptions
from sws_export.engines.events import EventReader
from sws_export.engines.gpu_memory import GpuMemory
from sws_export.engines.graph_check import check_graph
from sws_export.engines.header import plan_header
from sws_export.engines.memory import OUT_OF_MEMORY_ADVICE, is_out_of_memory
from sws_export.errors import EngineError
from sws_export.progress import Progress, SilentProgress, Stage
from sws_export.stage_timings import peak_memory
from sws_export.tensors import ProfileShapes

_POLL_SECONDS = 0.5
"""Interval between two readings of the child's memory."""
_SHOWN_WARNINGS = 5
_REMARKS = ("Converting conv activation scales to fp32", "Converting conv weight scales to fp32")
"""Warnings that need no action: TensorRT for RTX has one for each 8-bit convolution of a 16-bit graph."""
_WINDOWS_EXCEPTION = 0xC0000000
"""Exit codes of Windows processes from here on are NTSTATUS codes of exceptions."""

if sys.platform == "win32":
    _CREATION_FLAGS = subprocess.CREATE_NEW_PROCESS_GROUP
else:
    _CREATION_FLAGS = 0


@dataclass(frozen=True)
class EngineReport:
    """An engine that was built."""

    backend: str
    library_version: str
    compute_capabilities: tuple[str, ...]
    """Targets; empty means the GPU of the build machine."""
    size: int
    """Size of the serialized engine in bytes."""
    seconds: float
    """Wall time from the check of the graph to the complete engine."""
    parse_seconds: float
    build_seconds: float
    peak_memory: int
    """Largest resident memory of the build process in bytes."""
    layers: int
    decomposed_attentions: int
    """Attention layers without a fused kernel, which TensorRT may decompose."""
    warnings: dict[str, int]
    """Warnings of the library, and errors that did not stop it, with their number of occurrences."""
    gpu_memory: GpuMemory | None = None
    """Device memory of the engine, without its states; None if the builder's log has no such figures."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "EngineReport":
        """From the result of `dataclasses.asdict`."""
        memory = values["gpu_memory"]
        return cls(
            **dict(values)
            | {
                "compute_capabilities": tuple(values["compute_capabilities"]),
                "gpu_memory": GpuMemory.from_json(memory) if memory else None,
            }
        )


@dataclass
class Outcome:
    """What the child process has reported so far."""

    built: dict[str, Any] | None = None
    failure: Exception | None = None
    first_error: str = ""
    warnings: dict[str, int] = field(default_factory=dict)
    phase: str = "starting"
    peak_memory: int = 0


def build_engine(
    onnx_path: Path,
    out_path: Path,
    profiles: Sequence[ProfileShapes],
    options: BuildOptions,
    progress: Progress | None = None,
) -> EngineReport:
    """Build an engine from the graph at `onnx_path` and write it to `out_path`.

    A child process does the work. It ends when this process ends or this function is interrupted. If the
    build fails, `out_path` does not exist afterwards; a complete engine is never deleted. To replace an
    engine atomically, pass a path in the same directory and rename the file.

    Args:
        onnx_path: The graph, with its external data at the location stored in the file.
        out_path: The engine file; an existing file is overwritten.
        profiles: Minimum, optimum and maximum shape of each input, for each optimization profile; see
            `sws_export.tensors.shapes_for`.
        options: EngineBackend and build options.
        progress: Receives phases and warnings.

    Raises:
        CheckpointError: The graph is missing or not an ONNX model.
        EngineError: The graph has custom operators or lacks weights, the backend rejected it, or the child
            process failed or was killed.
        OptionError: The shapes do not fit the graph.
        OSError: The engine cannot be written to `out_path`.
    """
    progress = progress or SilentProgress()
    spec = {
        "parent": os.getpid(),
        "onnx": str(onnx_path.resolve()),
        "out": str(out_path.resolve()),
        "profiles": list(profiles),
        "options": options.to_json(),
    }
    started = time.monotonic()
    outcome = Outcome()
    complete = False
    try:
        with progress.stage(f"engine ({options.backend.name})") as stage, tempfile.TemporaryFile() as output:
            stage.describe("checking the graph")
            # Here, where onnx_ir is imported; a build process would take a second for that.
            check_graph(onnx_path, custom_operators=bool(options.plugins))
            with _child(spec, output) as (child, reader):
                _listen(child, reader, outcome, stage)
            output.seek(0)
            printed = output.read().decode(errors="replace")
        raise_failure(child.returncode, outcome, printed, options)
        complete = True
    finally:
        if not complete:
            out_path.unlink(missing_ok=True)
    report = _report(outcome, out_path, options, time.monotonic() - started)
    log_warnings(report, progress)
    return report


@contextlib.contextmanager
def _child(spec: dict[str, Any], output: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], EventReader]]:
    """The running child process and its events; the process has ended when the block exits."""
    with subprocess.Popen(
        # -P and this process's sys.path: the child imports the same modules, whatever its directory.
        [sys.executable, "-P", "-m", "sws_export.engines.child"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=output,
        # Ctrl-C reaches this process only, which then ends the child.
        process_group=0,
        creationflags=_CREATION_FLAGS,
    ) as child:
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            # If the child has already ended, its exit status gives the reason.
            with contextlib.suppress(OSError), child.stdin as stdin:
                stdin.write(json.dumps(spec).encode())
            yield child, EventReader(child.stdout)
        finally:
            child.kill()


def _listen(child: subprocess.Popen[bytes], reader: EventReader, outcome: Outcome, stage: Stage) -> None:
    """Process the child's events until it has ended."""
    with contextlib.suppress(EOFError):
        while True:
            event = reader.next_event(_POLL_SECONDS)
            outcome.peak_memory = max(outcome.peak_memory, peak_memory(child.pid))
            if event is not None:
                _record_event(event, outcome)
            stage.describe(_progress_text(outcome))
    child.wait()


def _progress_text(outcome: Outcome) -> str:
    return f"{outcome.phase}, {outcome.peak_memory / 1e9:.1f} GB"


def _record_event(event: dict[str, Any], outcome: Outcome) -> None:
    match event["event"]:
        case "phase":
            outcome.phase = event["text"]
        case "log":
            text = event["text"]
            outcome.warnings[text] = outcome.warnings.get(text, 0) + 1
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
    """Raise the error that the child's exit status, events and printed output indicate.

    Raises:
        EngineError: The child was killed, or reported this error.
        OptionError: The child reported this error.
        OSError: The child could not write the engine.
        RuntimeError: The child ended with a traceback, which is a bug of this package.
    """
    if code == 0 and outcome.built is not None:
        return
    if outcome.failure is not None:
        raise outcome.failure
    if code < 0:
        raise EngineError(_death(signal.Signals(-code).name, outcome, printed, options))
    if code >= _WINDOWS_EXCEPTION:
        raise EngineError(_death(f"exception {code:#x}", outcome, printed, options))
    raise RuntimeError(f"the engine build process ended with status {code}:\n{printed}")


def _death(cause: str, outcome: Outcome, printed: str, options: BuildOptions) -> str:
    total = psutil.virtual_memory().total
    memory = f"at {outcome.peak_memory / 1e9:.1f} of {total / 1e9:.1f} GB of memory"
    output = outcome.first_error or (printed.strip().splitlines() or [""])[-1].strip()
    output = f"; last output: {output}" if output else ""
    process = f"the {options.backend.name} build process"
    what = f"{process} was ended by {cause} in phase {outcome.phase!r}, {memory}{output}"
    if cause == "SIGKILL" or is_out_of_memory(output):
        return f"{what}; most likely memory ran out: {OUT_OF_MEMORY_ADVICE}"
    return f"{what}; this is a bug of the library: try another version of it, or report the graph to NVIDIA"


def _report(outcome: Outcome, out_path: Path, options: BuildOptions, seconds: float) -> EngineReport:
    built = outcome.built
    assert built is not None
    warnings, memory = dict(outcome.warnings), built["gpu_memory"]
    if memory is None:
        warnings["its log has no figures of the GPU memory that the engine needs"] = 1
    try:
        capabilities = plan_header(out_path).compute_capabilities
    except EngineError as error:
        # The layout of the header is undocumented, and the library has reported a complete engine.
        capabilities = options.targets
        warnings[f"the header of the new engine has an unknown layout: {error}"] = 1
    return EngineReport(
        backend=options.backend.name,
        library_version=built["library_version"],
        compute_capabilities=capabilities,
        size=out_path.stat().st_size,
        seconds=seconds,
        parse_seconds=built["parse_seconds"],
        build_seconds=built["build_seconds"],
        peak_memory=outcome.peak_memory,
        layers=built["layers"],
        decomposed_attentions=built["decomposed_attentions"],
        warnings=warnings,
        gpu_memory=GpuMemory.from_json(memory) if memory else None,
    )


def log_warnings(report: EngineReport, progress: Progress) -> None:
    """Report the first few warnings of the library, and log those that need no action."""
    warnings = []
    for text, count in report.warnings.items():
        line = f"{report.backend}: {text}" + (f" ({count} times)" if count > 1 else "")
        if any(remark in text for remark in _REMARKS):
            progress.log(line)
        else:
            warnings.append(line)
    for line in warnings[:_SHOWN_WARNINGS]:
        progress.warn(line)
    if len(warnings) > _SHOWN_WARNINGS:
        progress.warn(f"{report.backend}: {len(warnings) - _SHOWN_WARNINGS} more warnings, see the manifest")

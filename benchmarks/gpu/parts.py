"""The parts of the GPU benchmark, each in its own process: an illegal access ends all work of a process."""

import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Part:
    """A part and its time limit."""

    name: str
    seconds: float


@dataclasses.dataclass
class Record:
    """Results of a part so far, the file that they are written to, and when the part must be done."""

    out: Path
    deadline: float
    """In terms of `time.monotonic()`."""
    values: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self) -> None:
        """Write the results now: a part can be stopped at any time."""
        write_json(self.out, self.values)

    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


Work = Callable[[Record], bool]
"""Does a part's work and returns whether its checks passed."""

PARTS = (
    Part("build", 150),
    Part("transport", 80),
    Part("guard", 100),
    Part("timings", 150),
    Part("unet", 110),
    Part("engine", 60),
    Part("sanitizer", 150),
)
"""In order of importance for a run that is cut short."""


def run_parts(parts: Iterable[Part], out: Path, seconds: float, work: Mapping[str, Work]) -> dict[str, Any]:
    """Run parts one after the other and write `out` after each; results of a failed part are kept.

    A part is a forked process and the leader of its own process group: torch is imported once, by this
    process, which must not have used CUDA, and everything that a part has started ends with it.

    Args:
        parts: What to run, in this order.
        out: The results file.
        seconds: Time for everything; a part that does not finish in what is left is stopped.
        work: What each part does, by its name.

    Returns:
        The results. `parts` has a line for each part; those of successful parts begin with `done`.
    """
    end = time.monotonic() + seconds
    results: dict[str, Any] = {"parts": {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        left = min(part.seconds, end - time.monotonic())
        print(f"--- {part.name}, at most {max(left, 0):.0f} s", flush=True)
        results["parts"][part.name] = _run_part(work[part.name], out.with_suffix(".part"), left, results)
        print(f"--- {part.name}: {results['parts'][part.name]}", flush=True)
        write_json(out, results)
    return results


def _run_part(work: Work, file: Path, seconds: float, results: dict[str, Any]) -> str:
    """Run one part, add its results to `results`, and return how it ended."""
    if seconds <= 0:
        return "not run: no time left"
    file.unlink(missing_ok=True)
    started = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _become_part(work, Record(file, started + seconds))
    status = _wait(child, started + seconds)
    found = json.loads(file.read_text()) if file.exists() else {}
    file.unlink(missing_ok=True)
    rejected = found.pop("not_run", None)
    results |= found
    took = f"{time.monotonic() - started:.0f} s"
    if rejected is not None:
        return f"not run: {rejected}"
    if status is None:
        return f"stopped after {took}"
    return f"done in {took}" if status == 0 else f"failed with status {status} after {took}"


def _become_part(work: Work, record: Record) -> None:
    """In the child: do the work and end the process."""
    os.setsid()
    code = 1
    try:
        code = 0 if work(record) else 1
        record.save()
    except BaseException:
        traceback.print_exc()
        record.save()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, deadline: float) -> int | None:
    """Exit status of the child (negative: a signal), or None if it was stopped; ends its process group."""
    status = None
    while status is None and time.monotonic() < deadline:
        status = _exit_status(child)
        if status is None:
            time.sleep(_POLL_SECONDS)
    stop_group(child)
    if status is None:
        os.kill(child, signal.SIGKILL)  # if it has not become a group leader yet
        os.waitpid(child, 0)
    return status


def _exit_status(child: int) -> int | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    return None if pid == 0 else os.waitstatus_to_exitcode(status)


def in_child(question: Callable[[], bool]) -> bool:
    """The answer of `question`, asked in a forked process."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if question() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def stop_group(leader: int) -> None:
    """Kill all processes of the group that `leader` leads, if there are any."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replace the file atomically."""
    staged = path.with_name(f"{path.name}.tmp")
    staged.write_text(json.dumps(values, indent=2) + "\n")
    staged.replace(path)

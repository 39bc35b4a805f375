"""The parts of the GPU run, one process each: an illegal memory access breaks the CUDA context."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.kernels import ROOT


@dataclasses.dataclass(frozen=True)
class Part:
    """A part and its time limit in seconds."""

    name: str
    seconds: float


@dataclasses.dataclass
class Record:
    """The results of a part so far, and their file."""

    out: Path
    values: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self) -> None:
        """Write the results: a part may be stopped at any time."""
        write_json(self.out, self.values)


PARTS = (
    Part("build", 200),
    Part("transport", 120),
    Part("guard", 90),
    Part("timings", 150),
    Part("unet", 120),
    Part("engine", 90),
    Part("sanitizer", 240),
)
"""In order of importance for a short run; the last parts get the remaining time."""


def run_parts(names: list[str], out: Path, seconds: float) -> dict[str, Any]:
    """Run the parts one after the other and write `out` after each; results of a failed part are kept.

    Args:
        names: Of PARTS.
        out: The results file.
        seconds: Time limit of all parts; a part that exceeds the remaining time is stopped or skipped.

    Returns:
        The results. `parts` has one line per part with how it ended; successful ones begin with `done`.
    """
    end = time.monotonic() + seconds
    results: dict[str, Any] = {"parts": {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if part.name not in names:
            continue
        left = min(part.seconds, end - time.monotonic())
        print(f"--- {part.name}, at most {max(left, 0):.0f} s", flush=True)
        results["parts"][part.name] = _run_part(part.name, out.with_suffix(".part"), left, results)
        print(f"--- {part.name}: {results['parts'][part.name]}", flush=True)
        write_json(out, results)
    return results


def _run_part(name: str, file: Path, seconds: float, results: dict[str, Any]) -> str:
    """Run one part, merge its results into `results`, and return how it ended."""
    if seconds <= 0:
        return "not run: the time is up"
    file.unlink(missing_ok=True)
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--part", name, "--out", str(file)]
    try:
        code: int | None = subprocess.run(command, cwd=ROOT, check=False, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        code = None
    found = json.loads(file.read_text()) if file.exists() else {}
    file.unlink(missing_ok=True)
    refused = found.pop("not_run", None)
    results |= found
    took = f"{time.monotonic() - started:.0f} s"
    if refused is not None:
        return f"not run: {refused}"
    if code is None:
        return f"cut off after {took}"
    return f"done in {took}" if code == 0 else f"failed with status {code} after {took}"


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replace the file in one step, so that a killed run leaves a complete file."""
    staged = path.with_name(f"{path.name}.tmp")
    staged.write_text(json.dumps(values, indent=2) + "\n")
    staged.replace(path)

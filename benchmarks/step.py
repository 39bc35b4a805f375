"""Time and peak memory of one UNet step: plain, with SWS, and in eager torch.

    python benchmarks/step.py --work bench --out benchmarks/results/step.json
    python benchmarks/step.py --work bench --out benchmarks/results/step.json --only 'SD1.5 512, batch 1'
    python benchmarks/step.py --table benchmarks/results/step.json

One command creates the checkpoints with random weights and the graphs in `--work` (25 GB, reused by the next
run) and one JSON file. Each case of step_cases.py runs in its own process and is written as soon as it is
measured; if a case fails, is killed or times out, its error is written instead. `--resume` measures only
cases that the file does not have. With `--rounds 3` all cases are measured three times in turn, and the
shortest time of each is kept: the speed of a shared machine drifts. The cost of the key guard depends on the
step, so there are cases for early and late steps, intensity 0 and a binding budget.
"""

import argparse
import dataclasses
import fnmatch
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from step_cases import CASES, Case  # noqa: E402
from step_graphs import MODELS, checkpoint_path, describe_graph, graph_path, write_graphs  # noqa: E402
from step_table import print_row, table  # noqa: E402


def worker(task: dict[str, Any]) -> Any:
    """Run one case, or write the graphs of a model; runs in its own process."""
    folder = Path(task["work"])
    if task["kind"] == "graphs":
        return write_graphs(task["model"], folder, task["forms"])
    case = Case(**task["case"])
    if case.kind == "torch":
        from step_torch import run_torch

        return run_torch(checkpoint_path(MODELS[case.model], folder), case, task["threads"])
    from step_work import build_rtx, run_graph

    path = graph_path(folder, case.model, case.form)
    result = build_rtx(path) if case.kind == "rtx" else run_graph(path, case, task["threads"])
    return result | {"graph": describe_graph(path)}


def in_process(seconds: float, **task: Any) -> Any:
    """The result of `worker(task)` in a new process, or {"error": text}."""
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {seconds:g} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"]
        return {"error": lines[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def run(cases: list[Case], arguments: argparse.Namespace) -> None:
    """Measure the cases and write each result to the output file."""
    import onnxruntime

    results: dict[str, Any] = {"cases": {}}
    if arguments.resume and arguments.out.exists():
        results = json.loads(arguments.out.read_text("utf-8"))
    results |= {
        "machine": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "onnxruntime": onnxruntime.__version__,
    }
    arguments.work.mkdir(parents=True, exist_ok=True)
    done = {key for key, row in results["cases"].items() if "error" not in row}
    cases = [case for case in cases if case.key not in done]
    for number, case in enumerate(cases * arguments.rounds):
        print(f"[{number + 1}/{len(cases) * arguments.rounds}] {case.key}", flush=True)
        begin = time.monotonic()
        row = _measure(case, arguments)
        row |= {"load_average": os.getloadavg()[0], "took": round(time.monotonic() - begin, 1)}
        if number >= len(cases):
            row = _shortest(results["cases"][case.key], row)
        results["cases"][case.key] = dataclasses.asdict(case) | row | {"rounds": number // len(cases) + 1}
        _write(arguments.out, results)
        print_row(case.group, case.name, results["cases"])


def _shortest(earlier: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """`row` with the shorter times of both; an error of either."""
    if "error" in earlier or "error" in row:
        return earlier if "error" in earlier else row
    return row | {name: min(earlier[name], row[name]) for name in ("seconds", "cpu_seconds")}


def _measure(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """The result of a case; writes its graphs first if they are missing."""
    forms = sorted({other.form for other in CASES if other.model == case.model and other.kind != "torch"})
    missing = [form for form in forms if not graph_path(arguments.work, case.model, form).exists()]
    if case.kind != "torch" and case.form in missing:
        task = {"kind": "graphs", "model": case.model, "forms": forms, "work": str(arguments.work)}
        failed = in_process(arguments.timeout, **task)
        if failed:
            return dict(failed)
    task = {"kind": "case", "case": dataclasses.asdict(case), "work": str(arguments.work)}
    return dict(in_process(arguments.timeout, threads=arguments.threads, **task))


def _write(out: Path, results: dict[str, Any]) -> None:
    staged = out.with_name(f".{out.name}")
    staged.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    staged.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and peak memory of one UNet step.")
    parser.add_argument("--work", type=Path, help="directory for checkpoints and graphs, reused between runs")
    parser.add_argument("--out", type=Path, help="JSON file with the results")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cases or groups")
    parser.add_argument("--resume", action="store_true", help="measure only cases missing in the file")
    parser.add_argument(
        "--rounds", type=int, default=1, help="number of times that all cases are measured, in turn"
    )
    parser.add_argument("--timeout", type=float, default=900, metavar="SECONDS", help="time limit of a case")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--table", type=Path, metavar="FILE", help="print results as a table and stop")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(json.loads(arguments.worker))))
        return
    if arguments.table:
        print(table(json.loads(arguments.table.read_text("utf-8"))["cases"]))
        return
    if arguments.work is None or arguments.out is None:
        parser.error("--work and --out are required")
    run([case for case in CASES if any(_matches(case, pattern) for pattern in arguments.only)], arguments)


def _matches(case: Case, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (case.key, case.group))


if __name__ == "__main__":
    main()

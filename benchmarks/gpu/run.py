"""Check and time the plugin kernels on the GPU of this machine.

Run `benchmarks/gpu/run.sh`, or `python -m benchmarks.gpu.run` in the root of the repository. It needs nvcc
and a CUDA build of PyTorch, and no network. It writes the results file after each part and prints the tables.
"""

import argparse
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.correctness import Finding, check_fused_guard, check_guard, check_transport
from benchmarks.gpu.example_engine import check_example_engine
from benchmarks.gpu.kernels import BUILD, ROOT, Kernels, build_kernels
from benchmarks.gpu.parts import PARTS, Record, Work, in_child, run_parts, write_json
from benchmarks.gpu.ptxas_report import as_table, parse_ptxas_log
from benchmarks.gpu.sanitizer import found_nothing, run_small_case, sanitize
from benchmarks.gpu.site_timings import time_site, time_state_update
from benchmarks.gpu.sites import SITES
from benchmarks.gpu.summary import as_markdown, summarize
from benchmarks.gpu.timing import copy_bandwidth, matmul_rate
from benchmarks.gpu.unet_step import time_unet_steps

DEVICE = "cuda"


def build(record: Record) -> bool:
    """Compile the kernels; record the machine and the compiler's resource usage."""
    build_kernels()
    driver = torch.cuda.get_device_properties(0)
    record.values |= {
        "device": torch.cuda.get_device_name(),
        "capability": f"{driver.major}.{driver.minor}",
        "l2_bytes": getattr(driver, "L2_cache_size", None),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "ptxas": as_table(parse_ptxas_log((BUILD / "build.log").read_text())),
    }
    return True


def compare(check: Callable[[Kernels, str], Iterable[Finding]], name: str) -> Work:
    """A part that records its findings, including those made before a failure."""

    def part(record: Record) -> bool:
        findings = []
        try:
            for finding in check(build_kernels(), DEVICE):
                findings.append(finding)
                if len(findings) % 50 == 0:
                    print(f"{len(findings)} comparisons", flush=True)
        finally:
            record.values[name] = [finding.as_json() for finding in findings]
        report_failures(findings)
        return all(finding.passed for finding in findings)

    return part


def report_failures(findings: list[Finding]) -> None:
    """Print the failures, worst first."""
    failures = [finding for finding in findings if not finding.passed]
    print(f"{len(findings)} comparisons, {len(failures)} failed")
    for failure in sorted(failures, key=lambda f: f.error / max(f.allowed, 1e-30), reverse=True)[:20]:
        print(f"  {failure.kernel}, {failure.case}: {failure.error:.3g} > {failure.allowed:.3g}")


def timings(record: Record) -> bool:
    """Time every site; results are saved one by one."""
    kernels = build_kernels()
    record.values["copy_bytes_per_second"] = copy_bandwidth(DEVICE)
    record.values["matmul_flops_per_second"] = matmul_rate(DEVICE)
    record.values["timings"], record.values["state_updates"] = [], {}
    for site in SITES:
        timing = time_site(kernels, site, DEVICE).as_json()
        print(json.dumps(timing), flush=True)
        record.values["timings"].append(timing)
        record.values["state_updates"][site.name] = time_state_update(site, DEVICE)
        record.save()
    return True


def unet(record: Record) -> bool:
    """Time a plain step of each model."""
    record.values["steps"] = {}
    for model, step in time_unet_steps(DEVICE):
        print(f"{model}: {step}", flush=True)
        record.values["steps"][model] = step
        record.save()
    return True


def engine(record: Record) -> bool:
    """Compare the example as a TensorRT for RTX engine with ONNX Runtime."""
    found = check_example_engine(BUILD)
    if isinstance(found, str):
        record.values["not_run"] = found
        return True
    record.values["engine"] = found
    return bool(found["passed"])


def sanitizer(record: Record) -> bool:
    """Run each sanitizer tool; results are saved one by one."""
    record.values["sanitizer"] = {}
    for tool, verdict in sanitize(record.seconds_left() - SANITIZER_RESERVE):
        print(f"{tool}: {verdict}", flush=True)
        record.values["sanitizer"][tool] = verdict
        record.save()
    return all(map(found_nothing, record.values["sanitizer"].values()))


SANITIZER_RESERVE = 3.0
"""Seconds to end the last tool and to save."""


def check_both_guards(kernels: Kernels, device: str) -> Iterable[Finding]:
    """The plugin's guard and that of the GPU lowering."""
    yield from check_guard(kernels, device)
    yield from check_fused_guard(kernels, device)


WORK: dict[str, Work] = {
    "build": build,
    "transport": compare(check_transport, "transport_findings"),
    "guard": compare(check_both_guards, "guard_findings"),
    "timings": timings,
    "unet": unet,
    "engine": engine,
    "sanitizer": sanitizer,
}


def unpack_wheels(wheels: Path, target: Path) -> None:
    """Make the packages in `wheels` importable, if there are any; packages of this Python take precedence."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    if target.exists():
        sys.path.append(str(target))


def default_out() -> Path:
    """`gpu.json` in the folder that $OUT names, else in benchmarks/results/gpu."""
    return Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu") / "gpu.json"


def print_tables(results: dict[str, Any], out: Path) -> None:
    """Print the tables and the goals, and add both to the results."""
    if not results.get("timings") or "device" not in results:
        return
    results["summary"] = summarize(
        results["timings"],
        results["state_updates"],
        results.get("steps", {}),
        results["copy_bytes_per_second"],
        results["matmul_flops_per_second"],
    )
    write_json(out, results)
    print(as_markdown(results))
    print(json.dumps(results["summary"]["goals"], indent=2))


def main() -> int:
    """Run all parts; returns 1 if one failed."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=default_out(), help="results file; default $OUT/gpu.json")
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / "build" / "gpu-wheels", help="packages to unpack"
    )
    parser.add_argument("--seconds", type=float, default=500, help="time limit of the whole run; default 500")
    parser.add_argument("--only", choices=names, nargs="+", default=names, help="parts to run")
    parser.add_argument("--small-case", action="store_true", help="run the case for compute-sanitizer")
    options = parser.parse_args()
    if options.small_case:
        run_small_case(build_kernels(), DEVICE)
        return 0
    # In a child: a process that has used CUDA must not fork.
    if not in_child(torch.cuda.is_available):
        print("no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 1
    unpack_wheels(options.wheels, BUILD / "packages")
    chosen = [part for part in PARTS if part.name in options.only]
    results = run_parts(chosen, options.out, options.seconds, WORK)
    print_tables(results, options.out)
    print(f"written to {options.out}")
    print(json.dumps(results["parts"], indent=2))
    return 0 if all(how.startswith(("done", "not run")) for how in results["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

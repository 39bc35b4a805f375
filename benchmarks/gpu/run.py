"""Check and time the plugin kernels on the GPU of this machine.

Run `benchmarks/gpu/run.sh`, or `python -m benchmarks.gpu.run` in the root of the repository. It needs nvcc
and a CUDA build of PyTorch, and no network. It writes the results file after each part and prints the tables.
"""

import argparse
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.correctness import Finding, check_fused_guard, check_guard, check_transport
from benchmarks.gpu.example_engine import check_example_engine
from benchmarks.gpu.kernels import ROOT, Kernels, build_kernels
from benchmarks.gpu.parts import PARTS, Record, Work, in_child, run_parts, write_json
from benchmarks.gpu.ptxas_report import as_table, parse_ptxas_log
from benchmarks.gpu.sanitizer import found_nothing, sanitize
from benchmarks.gpu.site_timings import time_site, time_state_update
from benchmarks.gpu.sizes import FULL, SMALL, SiteGroup, Sizes, Sweep
from benchmarks.gpu.summary import as_markdown, summarize
from benchmarks.gpu.timing import copy_bandwidth, matmul_rate
from benchmarks.gpu.unet_step import time_unet_steps

DEVICE = "cuda"
Check = Callable[[Kernels, str, Sweep], Iterable[Finding]]


def build(record: Record, folder: Path) -> bool:
    """Compile the kernels in `folder`; record the machine and the compiler's resource usage."""
    build_kernels(folder)
    driver = torch.cuda.get_device_properties(0)
    record.values |= {
        "device": torch.cuda.get_device_name(),
        "capability": f"{driver.major}.{driver.minor}",
        "l2_bytes": getattr(driver, "L2_cache_size", None),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "ptxas": as_table(parse_ptxas_log((folder / "build.log").read_text())),
    }
    return True


def compare(record: Record, name: str, kernels: Kernels, check: Check, sweep: Sweep) -> bool:
    """Record the findings of a check under `name`, including those made before a failure."""
    findings = []
    try:
        for finding in check(kernels, DEVICE, sweep):
            findings.append(finding)
            if len(findings) % 50 == 0:
                print(f"{len(findings)} comparisons", flush=True)
    finally:
        record.values[name] = [finding.as_json() for finding in findings]
    report_failures(findings)
    return all(finding.passed for finding in findings)


def report_failures(findings: list[Finding]) -> None:
    """Print the failures, worst first."""
    failures = [finding for finding in findings if not finding.passed]
    print(f"{len(findings)} comparisons, {len(failures)} failed")
    for failure in sorted(failures, key=lambda f: f.error / max(f.allowed, 1e-30), reverse=True)[:20]:
        print(f"  {failure.kernel}, {failure.case}: {failure.error:.3g} > {failure.allowed:.3g}")


def timings(record: Record, kernels: Kernels, sizes: Sizes) -> bool:
    """Time every site; results are saved one by one."""
    record.values["copy_bytes_per_second"] = copy_bandwidth(DEVICE, sizes.copy_elements)
    record.values["matmul_flops_per_second"] = matmul_rate(DEVICE, sizes.matmul_size)
    record.values["timings"], record.values["state_updates"] = [], {}
    for site in sizes.sites:
        timing = time_site(kernels, site, DEVICE).as_json()
        print(json.dumps(timing), flush=True)
        record.values["timings"].append(timing)
        record.values["state_updates"][site.name] = time_state_update(site, DEVICE)
        record.save()
    return True


def unet(record: Record, sizes: Sizes) -> bool:
    """Time a plain step of each model."""
    record.values["steps"] = {}
    for model, step in time_unet_steps(DEVICE, sizes.unets):
        print(f"{model}: {step}", flush=True)
        record.values["steps"][model] = step
        record.save()
    return True


def engine(record: Record, folder: Path) -> bool:
    """Compare the example as a TensorRT for RTX engine, written to `folder`, with ONNX Runtime."""
    found = check_example_engine(folder)
    if isinstance(found, str):
        record.values["not_run"] = found
        return True
    record.values["engine"] = found
    return bool(found["passed"])


def sanitizer(record: Record, folder: Path) -> bool:
    """Run each sanitizer tool on the kernels in `folder`; results are saved one by one."""
    record.values["sanitizer"] = {}
    for tool, verdict in sanitize(folder, record.seconds_left() - SANITIZER_RESERVE):
        print(f"{tool}: {verdict}", flush=True)
        record.values["sanitizer"][tool] = verdict
        record.save()
    return all(map(found_nothing, record.values["sanitizer"].values()))


SANITIZER_RESERVE = 3.0
"""Seconds to end the last tool and to save."""


def check_both_guards(kernels: Kernels, device: str, sweep: Sweep) -> Iterable[Finding]:
    """The plugin's guard and that of the GPU lowering."""
    yield from check_guard(kernels, device, sweep)
    yield from check_fused_guard(kernels, device, sweep)


def work_of_parts(sizes: Sizes, folder: Path) -> dict[str, Work]:
    """What each part does, by its name; `folder` keeps what is compiled."""

    def comparison(name: str, check: Check) -> Work:
        return lambda record: compare(record, name, build_kernels(folder), check, sizes.sweep)

    return {
        "build": lambda record: build(record, folder),
        "transport": comparison("transport_findings", check_transport),
        "guard": comparison("guard_findings", check_both_guards),
        "timings": lambda record: timings(record, build_kernels(folder), sizes),
        "unet": lambda record: unet(record, sizes),
        "engine": lambda record: engine(record, folder),
        "sanitizer": lambda record: sanitizer(record, folder),
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


def print_tables(results: dict[str, Any], sites: Sequence[SiteGroup], out: Path) -> None:
    """Print the tables and the goals, and add both to the results."""
    if not results.get("timings") or "device" not in results:
        return
    results["summary"] = summarize(
        sites,
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
    parser.add_argument("--small", action="store_true", help="small sizes: a check that all parts work")
    parser.add_argument(
        "--build-folder",
        type=Path,
        default=ROOT / "build" / "benchmarks-gpu",
        help="what is compiled or unpacked; default build/benchmarks-gpu",
    )
    options = parser.parse_args()
    sizes = SMALL if options.small else FULL
    # In a child: a process that has used CUDA must not fork.
    if not in_child(torch.cuda.is_available):
        print("no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 1
    unpack_wheels(options.wheels, options.build_folder / "packages")
    chosen = [part for part in PARTS if part.name in options.only]
    results = run_parts(chosen, options.out, options.seconds, work_of_parts(sizes, options.build_folder))
    results["small"] = options.small
    write_json(options.out, results)
    print_tables(results, sizes.sites, options.out)
    print(f"written to {options.out}")
    print(json.dumps(results["parts"], indent=2))
    return 0 if all(how.startswith(("done", "not run")) for how in results["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

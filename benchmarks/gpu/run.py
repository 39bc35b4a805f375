"""Checks and times the kernels on the GPU at hand.

Run as `python -m benchmarks.gpu.run` from the repository's root. Needs nvcc, a CUDA build of PyTorch and no
network. Writes benchmarks/results/gpu.json and prints the tables.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.correctness import Finding, check_guard, check_transport
from benchmarks.gpu.kernels import ROOT, Kernels, compile_kernels
from benchmarks.gpu.ptxas_report import as_table, parse_ptxas_log
from benchmarks.gpu.references import make_guard_inputs, make_weights
from benchmarks.gpu.site_timings import time_site
from benchmarks.gpu.sites import SITES
from benchmarks.gpu.summary import as_markdown, summarize
from benchmarks.gpu.timing import copy_bandwidth, matmul_rate
from benchmarks.gpu.unet_step import time_unet_steps

DEVICE = "cuda"
BUILD = ROOT / "build" / "benchmarks-gpu"
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")


def build_kernels() -> Kernels:
    """The kernels for the current GPU."""
    major, minor = torch.cuda.get_device_capability()
    return Kernels(compile_kernels(f"{major}{minor}", BUILD))


def run_small_case(kernels: Kernels) -> None:
    """A little of everything, for compute-sanitizer: ragged shapes, every number format, every launch."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for channels in (40, 33):
            weights = make_weights(2, (9, 11), 8, DEVICE)
            x = torch.randn(2, 99, channels, device=DEVICE).to(dtype)
            kernels.banded_transport(weights, [x, x.clone()], 8)
        for head_size in (40, 41):
            q, k, k_perm, scalars = make_guard_inputs(
                2, 99, 2 * head_size, dtype, DEVICE, kappa=1e-3, sharpness=2
            )
            kernels.key_guard(q, k, k_perm, scalars, 2)
    torch.cuda.synchronize()


def sanitize() -> dict[str, str]:
    """What each tool of compute-sanitizer says about the small case."""
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    program = shutil.which("compute-sanitizer", path=search)
    if program is None:
        return dict.fromkeys(SANITIZER_TOOLS, "not run: compute-sanitizer is not installed")
    verdicts = {}
    for tool in SANITIZER_TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "9"]
        command += [sys.executable, "-m", "benchmarks.gpu.run", "--small-case"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        lines = [line for line in result.stdout.splitlines() if "=========" in line]
        verdicts[tool] = (
            f"exit {result.returncode}: {lines[-1].strip('= ') if lines else result.stderr[-300:]}"
        )
    return verdicts


def measure(kernels: Kernels) -> dict[str, Any]:
    """All timings and what follows from them."""
    bandwidth, rate = copy_bandwidth(DEVICE), matmul_rate(DEVICE)
    timings = [time_site(kernels, site, DEVICE).as_json() for site in SITES]
    steps = time_unet_steps(DEVICE)
    return {
        "copy_bytes_per_second": bandwidth,
        "matmul_flops_per_second": rate,
        "timings": timings,
        "summary": summarize(timings, steps, bandwidth, rate),
    }


def describe_machine() -> dict[str, Any]:
    """The GPU and the software, for the record."""
    return {
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def report_failures(findings: list[Finding]) -> None:
    """Prints what is wrong, worst first."""
    failures = sorted((f for f in findings if not f.passed), key=lambda f: f.error / f.allowed, reverse=True)
    print(f"{len(findings)} comparisons, {len(failures)} failed")
    for failure in failures[:20]:
        print(f"  {failure.kernel}, {failure.case}: {failure.error:.3g} > {failure.allowed:.3g}")


def main() -> int:
    """Runs everything; 1 if a comparison failed or a sanitizer found something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--only", choices=["correctness", "timings"], help="leave the other half out")
    parser.add_argument("--small-case", action="store_true", help="run what compute-sanitizer is to watch")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 1
    kernels = build_kernels()
    if options.small_case:
        run_small_case(kernels)
        return 0

    results = describe_machine()
    results["ptxas"] = as_table(parse_ptxas_log((BUILD / "build.log").read_text()))
    failed = False
    if options.only != "timings":
        findings = check_transport(kernels, DEVICE) + check_guard(kernels, DEVICE)
        report_failures(findings)
        results["correctness"] = [finding.as_json() for finding in findings]
        results["sanitizer"] = sanitize()
        print(json.dumps(results["sanitizer"], indent=2))
        failed = any(not f.passed for f in findings) or any(
            "exit 9" in v for v in results["sanitizer"].values()
        )
    if options.only != "correctness":
        results |= measure(kernels)
        print(as_markdown(results))
        print(json.dumps(results["summary"]["goals"], indent=2))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

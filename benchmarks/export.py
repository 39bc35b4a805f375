"""Wall time and peak memory of an export, compared with other exporters, and of a run to an engine.

    python benchmarks/export.py --family shapes
    python benchmarks/export.py --family sd15 --optimum-python ~/optimum/bin/python
    python benchmarks/export.py --family sdxl --only plain sws pipeline

Each run is one process. Its memory is the peak of the resident memory of that process and its children.
Random weights are written to a temporary directory (`--scratch`) and deleted afterwards, as are the graphs.
`sws first` has an empty cache, `sws again` that of an export with other options; the other runs have none.

optimum-onnx requires older versions of transformers and diffusers than sws-export, so it runs in the Python
of another environment: `pip install optimum-onnx onnxruntime 'diffusers<0.37' torch==2.13.0`.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUNS = (
    "plain",
    "sws",
    "sws first",
    "sws again",
    "plain fp32",
    "torchscript",
    "optimum",
    "pipeline plain",
    "pipeline",
)
SIZES = {
    "shapes": ["--batch", "1:2:4", "--tokens", "8"],
    "sd15": ["--batch", "1:2:2", "--height", "512:512:768", "--width", "512:512:768"],
    "sdxl": ["--batch", "1:2:2", "--height", "1024", "--width", "1024"],
}
PACKAGES = ("torch", "diffusers", "onnx", "onnx-ir", "onnxruntime", "tensorrt-rtx-cu13", "optimum-onnx")
_POLL_SECONDS = 0.1
_COUNT = """
import sys, onnx
model = onnx.load(sys.argv[1], load_external_data=False)
print(len(model.graph.node))
"""


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="sws-export-benchmark-", dir=arguments.scratch) as folder:
        scratch = Path(folder)
        unet = make_checkpoint(arguments.family, scratch)
        weights = sum(file.stat().st_size for file in unet.glob("*.safetensors"))
        if hasattr(os, "sync"):
            # The first run would wait for the disk otherwise.
            os.sync()
        runs: dict[str, Any] = {}
        for name in arguments.only or RUNS:
            runs[name] = run(name, unet, scratch, arguments)
            print_run(name, runs[name])
    report = {
        "family": arguments.family,
        "weights_bytes": weights,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(sys.executable),
        "optimum_versions": versions(arguments.optimum_python) if arguments.optimum_python else None,
        "runs": runs,
    }
    out = arguments.out or RESULTS / f"export-{arguments.family}.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{table(report)}\n\nwrote {out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=SIZES, required=True)
    parser.add_argument("--only", nargs="+", choices=RUNS, metavar="RUN", help=f"some of {', '.join(RUNS)}")
    parser.add_argument("--optimum-python", help="Python of an environment with optimum-onnx")
    parser.add_argument("--no-validate", action="store_true", help="run the pipeline without validation")
    parser.add_argument("--scratch", type=Path, help="directory with free space for 4 times the weights")
    parser.add_argument("--out", type=Path, help="report; default: benchmarks/results/export-FAMILY.json")
    return parser.parse_args()


def make_checkpoint(family: str, scratch: Path, *, small: bool = False) -> Path:
    """Directory of the UNet: the trained example, or random float16 weights at full size or scaled down."""
    if family == "shapes":
        return ROOT / "examples" / "shapes" / "unet"
    unet = scratch / "unet"
    script = ROOT / "examples" / "make_checkpoint.py"
    command = [sys.executable, script, "--family", family, "--dtype", "fp16", "--out", unet]
    subprocess.run([*command, *["--small"] * small], check=True, stdout=subprocess.DEVNULL)
    return unet


def run(name: str, unet: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time, memory and files of the run `name`."""
    folder = scratch / "out"
    folder.mkdir()
    out = folder / ("unet.plan" if name.startswith("pipeline") else "unet.onnx")
    try:
        command = command_of(name, unet, out, arguments)
        if command is None:
            return {"failed": "not run: --optimum-python was not given"}
        cache = scratch / name
        if name == "sws again":
            measure([*command, "--plain"], cache)
        figures = measure(command, cache)
        if "failed" not in figures:
            files = [file for file in folder.iterdir() if file.suffix != ".json"]
            figures["bytes"] = sum(file.stat().st_size for file in files)
            if out.suffix == ".onnx":
                figures["nodes"] = count_nodes(out)
            figures |= manifest_figures(out)
        return figures
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def command_of(name: str, unet: Path, out: Path, arguments: argparse.Namespace) -> list[str] | None:
    if name in ("torchscript", "optimum"):
        python = sys.executable if name == "torchscript" else arguments.optimum_python
        script = ROOT / "benchmarks" / "export_peers.py"
        return [python, str(script), name, str(unet), str(out)] if python else None
    command = [sys.executable, "-m", "cli", str(unet), "--out", str(out)]
    if name not in ("sws first", "sws again"):
        # Other exporters keep nothing for a later run either.
        command.append("--no-cache")
    if "plain" in name:
        command.append("--plain")
    if name.startswith("pipeline"):
        command += SIZES[arguments.family]
    if not name.startswith("pipeline") or arguments.no_validate:
        command.append("--no-validate")
    return [*command, "--precision", "fp32" if name.endswith("fp32") else "fp16"]


def measure(command: Sequence[str], cache: Path) -> dict[str, Any]:
    """Wall time, processor time and peak memory of a command and its children; `cache` is sws-export's."""
    with tempfile.TemporaryFile() as output:
        start, before = time.monotonic(), os.times()
        # diffusers and transformers would contact the Hugging Face hub otherwise.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        environment["SWS_EXPORT_CACHE_DIR"] = str(cache)
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree_memory(process))
            time.sleep(_POLL_SECONDS)
        seconds, after = time.monotonic() - start, os.times()
        output.seek(0)
        printed = output.read().decode(errors="replace")
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    figures: dict[str, Any] = {
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
        "peak_memory": peak,
        "load": os.getloadavg()[0],
    }
    if process.returncode != 0:
        lines = printed.strip().splitlines() or ["nothing printed"]
        figures["failed"] = f"exit status {process.returncode}: {lines[-1]}"
    return figures


def tree_memory(process: psutil.Process) -> int:
    """Current resident memory of a process and its children, in bytes."""
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def count_nodes(path: Path) -> int:
    counted = subprocess.run([sys.executable, "-c", _COUNT, path], check=True, capture_output=True, text=True)
    return int(counted.stdout)


def manifest_figures(out: Path) -> dict[str, Any]:
    """Stage timings from the manifest; empty for other exporters."""
    path = out.with_name(out.name + ".json")
    if not path.exists():
        return {}
    manifest = json.loads(path.read_text())
    figures: dict[str, Any] = {"stages": manifest["stages"]}
    if out.suffix == ".plan":
        figures["validation"] = manifest["validation"]
    return figures


def machine() -> dict[str, Any]:
    memory = psutil.virtual_memory().total
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "load": os.getloadavg(),
    }


def versions(python: str) -> dict[str, str]:
    script = (
        "import importlib.metadata as metadata, json\n"
        f"names = {PACKAGES}\n"
        "found = {}\n"
        "for distribution in metadata.distributions():\n"
        # The first distribution found is the one that Python imports.
        "    found.setdefault(distribution.metadata['Name'], distribution.version)\n"
        "print(json.dumps({name: found[name] for name in names if name in found}))"
    )
    found = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    return dict(json.loads(found.stdout))


def print_run(name: str, figures: dict[str, Any]) -> None:
    print(f"{name}: {figures.get('failed') or str(figures['seconds']) + ' s'}", flush=True)


def table(report: dict[str, Any]) -> str:
    """The report as a text table."""
    weights = report["weights_bytes"]
    lines = [
        f"{report['family']}, weights {weights / 1e9:.2f} GB",
        f"{'run':<14}{'seconds':>9}{'CPU s':>9}{'memory GB':>11}{'x weights':>11}{'nodes':>8}{'file GB':>9}",
    ]
    for name, run_ in report["runs"].items():
        if "failed" in run_:
            lines.append(f"{name:<14}{run_['failed']}")
            continue
        peak = run_["peak_memory"]
        lines.append(
            f"{name:<14}{run_['seconds']:>9.1f}{run_['processor_seconds']:>9.1f}{peak / 1e9:>11.2f}"
            f"{peak / weights:>11.2f}{run_.get('nodes', ''):>8}{run_['bytes'] / 1e9:>9.2f}"
        )
    for name, run_ in report["runs"].items():
        if name.startswith("pipeline") and "stages" in run_:
            lines += ["", f"{name}: stage, seconds, peak memory GB"]
            lines += [
                f"  {stage['name']:<12}{stage['seconds']:>8.1f}{stage['peak_memory'] / 1e9:>8.2f}"
                for stage in run_["stages"]
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

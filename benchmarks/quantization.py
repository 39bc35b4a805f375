"""Size, memory, build time and error of engines with 8-bit weights, beside the float16 one.

    python benchmarks/quantization.py --family sd15
    python benchmarks/quantization.py --family sdxl --only fp16 'int8 weights' --no-validate

Each variant is one run of `sws-export` to an engine for compute capabilities 8.9 and 12.0. The figures are
those of its manifest: the memory is what the builder reports for the profile, the error is that of the
validation. Random weights are written to a temporary directory (`--scratch`), which is deleted afterwards.
Variants that were measured before are kept in the report.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from benchmarks.export import RESULTS, machine, make_checkpoint, versions  # noqa: E402  (needs the path)

VARIANTS: dict[str, list[str]] = {
    "fp16": [],
    "int8 weights": ["--weights", "int8"],
    "fp8 weights": ["--weights", "fp8"],
    "int8": ["--precision", "int8"],
    "fp8": ["--precision", "fp8"],
}
SIZES = {"shapes": ["--batch", "2", "--tokens", "8"], "sd15": ["--batch", "2"], "sdxl": ["--batch", "2"]}


def main() -> None:
    arguments = parse_arguments()
    out = arguments.out or RESULTS / f"quantization-{arguments.family}.json"
    report = json.loads(out.read_text()) if out.exists() else {"runs": {}}
    with tempfile.TemporaryDirectory(prefix="sws-export-benchmark-", dir=arguments.scratch) as folder:
        scratch = Path(folder)
        unet = arguments.model or make_checkpoint(arguments.family, scratch)
        for name in arguments.only or VARIANTS:
            report["runs"][name] = run(name, unet, scratch, arguments)
            report |= {
                "family": arguments.family,
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "machine": machine(),
                "versions": versions(sys.executable),
            }
            out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{table(report)}\n\nwrote {out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=SIZES, required=True)
    parser.add_argument("--model", type=Path, help="checkpoint to use; default: random weights, see above")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--plain", action="store_true", help="without SWS")
    parser.add_argument("--no-validate", action="store_true", help="measure no error")
    parser.add_argument("--scratch", type=Path, help="directory with free space for 4 times the weights")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/quantization-FAMILY.json")
    return parser.parse_args()


def run(name: str, unet: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one variant, from its manifest."""
    plan = scratch / "engine.plan"
    command = [Path(sys.executable).with_name("sws-export"), unet, "--out", plan, "--precision", "fp16"]
    command += ["--compute-capability", "8.9,12.0", "--keep-onnx", "--no-cache", "--quiet"]
    command += [*SIZES[arguments.family], *VARIANTS[name]]
    command += ["--plain"] * arguments.plain + ["--no-validate"] * arguments.no_validate
    print(f"{name} …", flush=True)
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT)
    manifest = json.loads(plan.with_name("engine.plan.json").read_text())
    sizes = {file["name"]: file["bytes"] for file in manifest["files"]}
    memory = manifest["engine"]["gpu_memory"]
    outputs = {entry["name"]: entry["maximum"] for entry in manifest["validation"].get("outputs", [])}
    figures = {
        "plain": arguments.plain,
        "plan": sizes.pop(plan.name),
        "graph": sum(sizes.values()),
        "weights": memory["weights"] if memory else None,
        "activations": memory["profiles"][0]["activations"] if memory else None,
        "build_seconds": manifest["engine"]["build_seconds"],
        "build_memory": manifest["engine"]["peak_memory"],
        "error": outputs.get("out_sample"),
        "unquantized_error": manifest["validation"].get("unquantized", {}).get("maximum"),
        "quantization": manifest.get("quantization"),
    }
    for file in (plan, *(scratch / name for name in sizes)):
        file.unlink()
    return figures


def table(report: dict[str, Any]) -> str:
    """One row per variant, in Markdown."""
    head = ["variant", "plan", "graph", "weights", "activations", "build", "error"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, figures in report["runs"].items():
        error = "not measured" if figures["error"] is None else f"{figures['error']:.1e}"
        bytes_of = (_gigabytes(figures[key]) for key in ("plan", "graph", "weights"))
        activations = _gigabytes(figures["activations"])
        cells = [name, *bytes_of, activations, f"{figures['build_seconds']:.0f} s", error]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.3f} GB"


if __name__ == "__main__":
    main()

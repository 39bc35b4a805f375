"""Size, memory, build time and error of engines with 8-bit weights and activations, beside the float16 one.

    python -m benchmarks.quantization --model-name sd15
    python -m benchmarks.quantization --model-name sdxl --checkpoint sdxl/ --only fp16 int8 --measure engine
    python -m benchmarks.quantization --model-name sd15 --measure error --pixels 256
    python -m benchmarks.quantization --table

Each figure is one that `sws-export` reports. `engine` exports to an engine for compute capabilities 8.9 and
12.0, without validation: the memory is what the builder reports for the profile. `error` exports to a graph,
with validation: the largest difference of the prediction from the reference, over five steps of two small
images. With `--pixels` the graph has static shapes for one image of this size, and `sws-export validate`
compares it at this size. Random weights are written to a temporary directory (`--scratch`), which is deleted
afterwards. The report is written after each run, and figures of other runs in it are kept.
"""

import argparse
import contextlib
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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
MODELS = {
    "shapes": "trained example",
    "sd15-small": "SD1.5 scaled down, random weights",
    "sdxl-small": "SDXL scaled down, random weights",
    "sd15": "SD1.5, random weights",
    "sdxl": "SDXL, random weights",
}
TOKENS = {"shapes": ["--tokens", "8"]}
ENGINE = ["--compute-capability", "8.9,12.0", "--no-validate"]
MEASURES = ("engine", "error")
REPORT = RESULTS / "quantization.json"


def main() -> None:
    arguments = parse_arguments()
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if not arguments.table:
        with tempfile.TemporaryDirectory(prefix="sws-export-benchmark-", dir=arguments.scratch) as folder:
            family, _, small = arguments.model_name.partition("-")
            unet = arguments.checkpoint or make_checkpoint(family, Path(folder), small=bool(small))
            for name in arguments.only or VARIANTS:
                for measure in arguments.measure or MEASURES:
                    print(f"{arguments.model_name}, {name}: {measure} …", flush=True)
                    options = ["--plain"] if arguments.plain else []
                    options += [] if arguments.cache else ["--no-cache"]
                    pixels = arguments.pixels if measure == "error" else None
                    figures = run(measure, name, arguments.model_name, unet, Path(folder), options, pixels)
                    rows = report.setdefault(arguments.model_name, {})
                    key = f"error at {pixels}" if pixels else measure
                    rows.setdefault(name, {})[key] = figures | {
                        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                        "machine": machine(),
                        "versions": versions(sys.executable),
                    }
                    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{engine_table(report)}\n\n{error_table(report)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-name", choices=MODELS, default="shapes")
    parser.add_argument("--checkpoint", type=Path, help="directory of the UNet; default: see above")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--measure", nargs="+", choices=MEASURES, help="default: both")
    parser.add_argument("--pixels", type=int, help="height and width of the image for the error")
    parser.add_argument("--plain", action="store_true", help="without SWS, for less time")
    parser.add_argument(
        "--cache",
        action="store_true",
        help="use the cache of sws-export: a second run goes on after the calibration of the first one",
    )
    parser.add_argument("--scratch", type=Path, help="directory with free space for 4 times the weights")
    parser.add_argument("--out", type=Path, default=REPORT, help="report; default: %(default)s")
    parser.add_argument("--table", action="store_true", help="print the tables of the report only")
    return parser.parse_args()


def run(
    measure: str,
    variant: str,
    model: str,
    unet: Path,
    scratch: Path,
    options: list[str],
    pixels: int | None,
) -> dict[str, Any]:
    """The figures of a variant of a model."""
    if measure == "engine":
        options = [*options, "--batch", "2", *TOKENS.get(model, []), *ENGINE]
        with export(variant, unet, scratch / "engine.plan", options) as manifest:
            figures = engine_figures(manifest) | calibration_figures(manifest)
    elif pixels:
        tokens = TOKENS.get(model, ["--tokens", "77"])
        sizes = ["--batch", "1", "--height", str(pixels), "--width", str(pixels), *tokens]
        graph = scratch / "graph.onnx"
        with export(variant, unet, graph, [*options, *sizes, "--no-validate"]) as manifest:
            figures = error_figures(manifest | {"validation": validate(graph, unet)})
            figures |= calibration_figures(manifest)
    else:
        with export(variant, unet, scratch / "graph.onnx", options) as manifest:
            figures = error_figures(manifest) | calibration_figures(manifest)
    return {"plain": "--plain" in options} | figures


def engine_figures(manifest: dict[str, Any]) -> dict[str, Any]:
    """Size, memory and build time."""
    engine = manifest["engine"]
    memory = engine["gpu_memory"]
    return {
        "plan": next(file["bytes"] for file in manifest["files"] if file["name"] == "engine.plan"),
        "weights": memory["weights"] if memory else None,
        "activations": memory["profiles"][0]["activations"] if memory else None,
        "seconds": engine["build_seconds"],
        "host_memory": engine["peak_memory"],
        "quantized_layers": manifest.get("quantization", {}).get("layers"),
    }


def calibration_figures(manifest: dict[str, Any]) -> dict[str, Any]:
    """Time and memory of the calibration, if there was one."""
    stages = {stage["name"]: stage for stage in manifest["stages"]}
    if "calibrate" not in stages:
        return {}
    stage = stages["calibrate"]
    return {"calibration_seconds": stage["seconds"], "calibration_memory": stage["peak_memory"]}


def error_figures(manifest: dict[str, Any]) -> dict[str, Any]:
    """The error of the prediction, and which layers have 8 bits."""
    validation, quantization = manifest["validation"], manifest.get("quantization", {})
    prediction = next(output for output in validation["outputs"] if output["name"] == "out_sample")
    return {
        "error": prediction["maximum"],
        "tolerance": prediction["tolerance"],
        "reference": validation["reference"],
        "sizes": validation["sizes"],
        "graph": sum(file["bytes"] for file in manifest["files"]),
        "skipped_layers": quantization.get("skipped_layers"),
        "layer_errors": quantization.get("layer_errors"),
    }


@contextlib.contextmanager
def export(name: str, unet: Path, out: Path, options: list[str]) -> Iterator[dict[str, Any]]:
    """The manifest of an export of a variant, whose files are deleted at the end of the block."""
    options = [*options, *VARIANTS[name], "--quiet"]
    command(unet, "--out", out, "--precision", "fp16", *options).check_returncode()
    path = out.with_name(f"{out.name}.json")
    manifest: dict[str, Any] = json.loads(path.read_text())
    try:
        yield manifest
    finally:
        for file in (path, *(out.with_name(entry["name"]) for entry in manifest["files"])):
            file.unlink()


def validate(graph: Path, unet: Path) -> dict[str, Any]:
    """The report of `sws-export validate`, also of a graph over its tolerance."""
    found = command("validate", graph, unet, "--json", "--quiet")
    if not found.stdout:
        found.check_returncode()
    report: dict[str, Any] = json.loads(found.stdout)
    return report


def command(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    """Run `sws-export`."""
    program = Path(sys.executable).with_name("sws-export")
    return subprocess.run([program, *arguments], stdout=subprocess.PIPE, cwd=ROOT, check=False)


def engine_table(report: dict[str, Any]) -> str:
    """One row for each engine, in Markdown."""
    lines = [
        "| UNet | variant | plan | × fp16 | weights | activations | build | memory of the build | error |"
    ]
    lines.append("|---" * lines[0].count(" | ") + "|---|")
    for model, rows in report.items():
        for name in VARIANTS:
            figures = rows.get(name, {}).get("engine")
            if figures is None:
                continue
            exact = rows.get("fp16", {}).get("engine")
            ratio = f"{figures['plan'] / exact['plan']:.3f}" if exact else ""
            cells = [MODELS[model], name, _gigabytes(figures["plan"]), ratio]
            cells += [_gigabytes(figures["weights"]), _gigabytes(figures["activations"])]
            cells += [f"{figures['seconds']:.0f} s", _gigabytes(figures["host_memory"])]
            found = [row for key, row in rows[name].items() if key.startswith("error at ")]
            cells.append(f"{found[-1]['error']:.1e}" if found else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def error_table(report: dict[str, Any]) -> str:
    """One row for each model and size, in Markdown."""
    lines = [f"| UNet | latent | reference | {' | '.join(VARIANTS)} |", "|---" * (len(VARIANTS) + 3) + "|"]
    for model, rows in report.items():
        keys = dict.fromkeys(key for row in rows.values() for key in row if key.startswith("error"))
        for key in keys:
            errors = [rows.get(name, {}).get(key) for name in VARIANTS]
            (first, *_) = filter(None, errors)
            latent = " × ".join(str(first["sizes"][name]) for name in ("batch", "height", "width"))
            cells = ["" if found is None else f"{found['error']:.1e}" for found in errors]
            reference = first["reference"].rpartition(" ")[2]
            lines.append(f"| {MODELS[model]} | {latent} | {reference} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.3f} GB"


if __name__ == "__main__":
    main()

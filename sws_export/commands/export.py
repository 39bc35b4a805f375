"""`sws-export MODEL --out PATH`: export a UNet."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from sws_export.commands.shared import add_output_options, make_progress, print_json, print_line
from sws_export.options import ExportOptions

if TYPE_CHECKING:
    from rich.console import Console

    from sws_export.pipeline.run import ExportReport

_EPILOG = """\
examples:
  sws-export unet.safetensors --out engine.plan
  sws-export stable-diffusion-v1-5/ --out sd15.plan --batch 1:2:4 --height 512:512:768
  sws-export unet/ --out unet.onnx --sws beta=0.7 key_cap=0.2
  sws-export stabilityai/sdxl-turbo --out turbo.plan --variant fp16
  sws-export unet.onnx --out engine.plan --sites 'up_blocks.*.attn1' --compute-capability 8.9,12.0

other commands:
  sws-export inspect FILE              what an engine, ONNX graph, manifest or checkpoint is
  sws-export validate MODEL.onnx MODEL compare an exported graph with its checkpoint again
  sws-export sample ARTEFACT PIPELINE  images with and without SWS, side by side
  sws-export evaluate ARTEFACT PIPELINE what SWS changes in images, measured over many pairs
  sws-export report ARTEFACT [MODEL]   what SWS does at each site and step, as one HTML page
  sws-export triton ARTEFACT           a model repository for Triton Inference Server
  sws-export plugins build|info        the library of TensorRT plugins
  sws-export cache list|clear          results of earlier runs

Exit codes: 0 done, 1 an error in the input or of the machine, 2 wrong usage.
"""


def run(arguments: list[str]) -> int:
    """Export a UNet."""
    parser = argparse.ArgumentParser(
        prog="sws-export",
        description="Export a Stable-Diffusion-family UNet with Sigma-Weighted Shuffle attention.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        type=Path,
        help="diffusers directory, .safetensors file, plain .onnx graph, or repository[@revision] of the "
        "Hugging Face Hub",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help=".plan or .engine for an engine, .onnx for the graph"
    )
    ExportOptions.add_arguments(parser)
    add_output_options(parser)
    parsed = parser.parse_args(arguments)
    options = ExportOptions.from_arguments(parsed)

    from sws_export.pipeline.run import export

    progress, console = make_progress(parsed)
    report = export(parsed.model, parsed.out, options, progress)
    try:
        _print_report(report, parsed, console)
    except KeyboardInterrupt:
        files = ", ".join(str(file) for file in report.files)
        print_line(f"sws-export: interrupted; complete: {files or 'the dry run'}")
        return 1
    return 0


def _print_report(report: "ExportReport", parsed: argparse.Namespace, console: "Console") -> None:
    from sws_export.commands.terminal import print_export

    if not parsed.quiet:
        print_export(console, report)
    if parsed.json:
        print_json(
            {
                "files": [str(file) for file in report.files],
                "preflight": dataclasses.asdict(report.preflight),
                "cached": [timing.name for timing in report.stages if timing.cached],
                "manifest": report.manifest or {},
            }
        )

"""`sws-export MODEL --out PATH`: the main job."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sws_export.commands.shared import add_checkpoint_options, add_output_options, make_progress, print_json

if TYPE_CHECKING:
    from sws_export.options.options import ExportOptions

_EXPORT_HELP = """\
examples:
  sws-export unet.safetensors --out engine.plan
  sws-export stable-diffusion-v1-5/ --out sd15.plan --precision fp16 --batch 1:2:4 --height 512:512:768
  sws-export unet/ --out unet.onnx --sws beta=0.7 key_cap=0.2
  sws-export unet.onnx --out engine.plan --sites 'up_blocks.*.attn1' --compute-capability 8.9,12.0

other commands:
  sws-export inspect FILE              what an engine, ONNX graph, manifest or checkpoint is
  sws-export validate MODEL.onnx MODEL compare an exported graph with its checkpoint again
  sws-export sample ARTEFACT PIPELINE  pictures with and without SWS, side by side
  sws-export report ARTEFACT [MODEL]   what SWS does at each site and step, as one HTML page
  sws-export triton ARTEFACT           a model repository for Triton Inference Server
  sws-export plugins build|info        the library of TensorRT plugins
  sws-export cache list|clear          results of earlier runs

Exit codes: 0 done, 1 something about the input or the machine, 2 wrong usage.
"""


def run(arguments: list[str]) -> int:
    """Export a UNet."""
    parsed = _parser().parse_args(arguments)
    options = _options(parsed)
    from sws_export.commands.terminal import print_export
    from sws_export.pipeline.run import export

    progress, console = make_progress(parsed)
    report = export(parsed.model, parsed.out, options, progress)
    try:
        if not parsed.quiet:
            print_export(console, report)
        if parsed.json:
            print_json(
                {
                    "files": [str(file) for file in report.files],
                    "preflight": dataclasses.asdict(report.preflight),
                    "cached": [figures.name for figures in report.stages if figures.cached],
                    "manifest": report.manifest,
                }
            )
    except KeyboardInterrupt:
        files = ", ".join(str(file) for file in report.files)
        print(f"sws-export: interrupted; complete: {files or 'the dry run'}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sws-export",
        description="Export a Stable-Diffusion-family UNet with Sigma-Weighted Shuffle attention.",
        epilog=_EXPORT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", type=Path, help="diffusers directory, .safetensors file or plain .onnx graph"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help=".plan or .engine for an engine, .onnx for the graph"
    )
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), help="default: the checkpoint's own")
    _add_sws_options(parser)
    add_checkpoint_options(parser)
    _add_engine_options(parser)
    parser.add_argument("--no-validate", action="store_true", help="do not compare with the reference")
    parser.add_argument("--keep-onnx", action="store_true", help="keep the graph beside the engine")
    parser.add_argument("--no-cache", action="store_true", help="neither use nor keep results of other runs")
    parser.add_argument("--dry-run", action="store_true", help="say what will be needed and stop")
    add_output_options(parser)
    return parser


def _add_sws_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("SWS")
    group.add_argument(
        "--preset",
        choices=("sws", "node"),
        default="sws",
        help="sws: as described (default); node: what the published ComfyUI node computes",
    )
    group.add_argument(
        "--sws",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="parameters of SWS, see the README; repeatable",
    )
    group.add_argument(
        "--sites",
        action="append",
        default=[],
        metavar="PATTERN",
        help="attention sites by name, as in 'up_blocks.*.attn1'; '*.attn2' is cross-attention; repeatable; "
        "default: all self-attention",
    )
    group.add_argument(
        "--guard",
        choices=("fused", "literal"),
        help="how the key mixing is found: without (fused) or with stored logits; "
        "default: fused, unless the parameters forbid it",
    )
    group.add_argument(
        "--guard-rows", default="1", metavar="SHARE", help="query rows the guard looks at, such as 1/8"
    )
    group.add_argument(
        "--debug-outputs", action="store_true", help="let the graph tell what each site does at a step"
    )
    group.add_argument("--plain", action="store_true", help="export the UNet without SWS")


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sizes and engine",
        "A size given as one number is fixed in the graph, and what depends on it computed while exporting. "
        "Engines take MIN:OPT:MAX too; an .onnx graph takes any size where none is given. "
        "Height and width are in pixels.",
    )
    group.add_argument("--batch", metavar="SIZES", help="default of an engine: 1:2:2")
    group.add_argument("--height", metavar="SIZES", help="default of an engine: what the UNet was trained on")
    group.add_argument("--width", metavar="SIZES", help="default of an engine: what the UNet was trained on")
    group.add_argument("--tokens", metavar="SIZES", help="text tokens; default of an engine: 77")
    group.add_argument("--backend", metavar="NAME", help="tensorrt-rtx (default without a GPU) or tensorrt")
    group.add_argument("--compute-capability", metavar="N.N[,N.N…]", help="targets of tensorrt-rtx")
    group.add_argument("--builder-optimization-level", type=int, metavar="0-5", help="effort of the build")
    group.add_argument("--timing-cache", type=Path, metavar="FILE", help="kernel timings that builds share")
    group.add_argument("--refit", action="store_true", help="make the weights replaceable")
    group.add_argument("--strip-weights", action="store_true", help="leave the weights out of the plan")
    group.add_argument("--version-compatible", action="store_true", help="for later versions of TensorRT")
    group.add_argument("--hardware-compatible", action="store_true", help="for every GPU from Ampere on")
    group.add_argument("--weight-streaming", action="store_true", help="allow weights outside GPU memory")


def _options(parsed: argparse.Namespace) -> "ExportOptions":
    from sws_export.engines import parse_capabilities
    from sws_export.options.options import ExportOptions
    from sws_export.parameters import parse_parameters

    capabilities = parsed.compute_capability
    return ExportOptions(
        precision=parsed.precision,
        preset=parsed.preset,
        parameters=parse_parameters(parsed.sws),
        sites=tuple(parsed.sites),
        guard=parsed.guard,
        guard_rows=parsed.guard_rows,
        debug_outputs=parsed.debug_outputs,
        plain=parsed.plain,
        config=parsed.config,
        ema=parsed.ema,
        variant=parsed.variant,
        attention_head_dim=parsed.attention_head_dim,
        prediction_type=parsed.prediction_type,
        batch=parsed.batch,
        height=parsed.height,
        width=parsed.width,
        tokens=parsed.tokens,
        vae_scale=parsed.vae_scale,
        loras=tuple(parsed.lora),
        controlnet=parsed.controlnet,
        backend=parsed.backend,
        compute_capabilities=parse_capabilities(capabilities) if capabilities else (),
        optimization_level=parsed.builder_optimization_level,
        timing_cache=parsed.timing_cache,
        refit=parsed.refit,
        strip_weights=parsed.strip_weights,
        version_compatible=parsed.version_compatible,
        hardware_compatible=parsed.hardware_compatible,
        weight_streaming=parsed.weight_streaming,
        validate=not parsed.no_validate,
        keep_onnx=parsed.keep_onnx,
        cache=not parsed.no_cache,
        dry_run=parsed.dry_run,
    )

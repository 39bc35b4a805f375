"""The command `sws-export`: arguments, progress, exit codes."""

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sws_export.errors import SwsExportError, ValidationError

if TYPE_CHECKING:
    from sws_export.options import ExportOptions
    from sws_export.progress import Progress

_EXPORT_HELP = """\
examples:
  sws-export unet.safetensors --out engine.plan
  sws-export stable-diffusion-v1-5/ --out sd15.plan --precision fp16 --batch 1:2:4 --height 512:512:768
  sws-export unet/ --out unet.onnx --sws beta=0.7 key_cap=0.2
  sws-export unet.onnx --out engine.plan --sites 'up_blocks.*' --compute-capability 8.9,12.0

other commands:
  sws-export inspect FILE              what an engine, ONNX graph, manifest or checkpoint is
  sws-export validate MODEL.onnx MODEL compare an exported graph with its checkpoint again
  sws-export plugins build|info        the library of TensorRT plugins

Exit codes: 0 done, 1 something about the input or the machine, 2 wrong usage.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], int]] = {
        "inspect": _inspect,
        "validate": _validate,
        "plugins": _plugins,
    }
    # As Ctrl-C: leave through the clean-up of every stage.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if given and given[0] in commands:
            return commands[given[0]](given[1:])
        return _export(given)
    except SwsExportError as error:
        # Libraries that we quote break their messages into lines.
        print(f"sws-export: {' '.join(str(error).split())}", file=sys.stderr)
    except KeyboardInterrupt:
        print("sws-export: interrupted; nothing was written", file=sys.stderr)
    except BrokenPipeError:
        # Whoever read our output has enough. Keep Python from failing once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _interrupt(number: int, frame: object) -> NoReturn:  # noqa: ARG001  (the signature of a handler)
    raise KeyboardInterrupt


def _export(arguments: list[str]) -> int:
    parsed = _export_parser().parse_args(arguments)
    options = _options(parsed)
    from sws_export.pipeline import export
    from sws_export.terminal import print_export

    progress, console = _progress(parsed)
    report = export(parsed.model, parsed.out, options, progress)
    if not parsed.quiet:
        print_export(console, report)
    if parsed.json:
        _print_json(
            {
                "files": [str(file) for file in report.files],
                "preflight": dataclasses.asdict(report.preflight),
                "manifest": report.manifest,
            }
        )
    return 0


def _export_parser() -> argparse.ArgumentParser:
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
    _add_checkpoint_options(parser)
    _add_engine_options(parser)
    parser.add_argument("--no-validate", action="store_true", help="do not compare with the reference")
    parser.add_argument("--keep-onnx", action="store_true", help="keep the graph beside the engine")
    parser.add_argument("--dry-run", action="store_true", help="say what will be needed and stop")
    _add_output_options(parser)
    return parser


def _add_sws_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("SWS")
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
        help="attention sites by name, as in 'up_blocks.*'; repeatable; default: all self-attention",
    )
    group.add_argument(
        "--guard",
        choices=("fused", "literal"),
        help="how the key mixing is found: without (fused) or with stored logits; "
        "default: fused where it is exact",
    )
    group.add_argument(
        "--guard-rows", default="1", metavar="SHARE", help="query rows the guard looks at, such as 1/8"
    )
    group.add_argument("--plain", action="store_true", help="export the UNet without SWS")


def _add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--config", type=Path, metavar="FILE", help="diffusers config.json of the UNet")
    group.add_argument("--ema", action="store_true", help="take the EMA weights of an original checkpoint")
    group.add_argument("--variant", help="variant of the files in a directory, such as fp16")
    group.add_argument(
        "--attention-head-dim",
        type=_numbers,
        metavar="N[,N…]",
        help="heads of each level, for a UNet of no known family",
    )
    group.add_argument("--prediction-type", metavar="TYPE", help="epsilon, v_prediction or sample")
    group.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:SCALE]", help="fuse a LoRA; repeatable"
    )
    group.add_argument(
        "--controlnet", action="store_true", help="add inputs for the residuals of a ControlNet"
    )
    group.add_argument("--vae-scale", type=int, metavar="N", help="pixels a latent value covers")


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "engine", "sizes are MIN:OPT:MAX or one number; height and width in pixels"
    )
    group.add_argument("--batch", default="1:2:2", metavar="SIZES", help="default: %(default)s")
    group.add_argument("--height", metavar="SIZES", help="default: what the UNet was trained on")
    group.add_argument("--width", metavar="SIZES", help="default: what the UNet was trained on")
    group.add_argument("--tokens", default="77", metavar="SIZES", help="text tokens; default: %(default)s")
    group.add_argument("--backend", metavar="NAME", help="tensorrt-rtx (default without a GPU) or tensorrt")
    group.add_argument("--compute-capability", metavar="N.N[,N.N…]", help="targets of tensorrt-rtx")
    group.add_argument("--builder-optimization-level", type=int, metavar="0-5", help="effort of the build")
    group.add_argument("--timing-cache", type=Path, metavar="FILE", help="kernel timings that builds share")
    group.add_argument("--refit", action="store_true", help="make the weights replaceable")
    group.add_argument("--strip-weights", action="store_true", help="leave the weights out of the plan")
    group.add_argument("--version-compatible", action="store_true", help="for later versions of TensorRT")
    group.add_argument("--hardware-compatible", action="store_true", help="for every GPU from Ampere on")
    group.add_argument("--weight-streaming", action="store_true", help="allow weights outside GPU memory")


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _options(parsed: argparse.Namespace) -> "ExportOptions":
    from sws_export.engines import parse_capabilities
    from sws_export.options import ExportOptions
    from sws_export.parameters import parse_parameters

    capabilities = parsed.compute_capability
    return ExportOptions(
        precision=parsed.precision,
        parameters=parse_parameters(parsed.sws),
        sites=tuple(parsed.sites),
        guard=parsed.guard,
        guard_rows=parsed.guard_rows,
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
        dry_run=parsed.dry_run,
    )


def _inspect(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="sws-export inspect", description="Say what a file is.")
    parser.add_argument("file", type=Path, help="engine, ONNX graph, manifest, checkpoint or model directory")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parsed = parser.parse_args(arguments)
    from sws_export.inspection import inspect_file

    facts = inspect_file(parsed.file)
    if parsed.json:
        _print_json(facts)
    else:
        from sws_export.terminal import print_facts

        print_facts(facts)
    return 0


def _validate(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sws-export validate",
        description="Compare an exported graph with the eager reference on its checkpoint.",
    )
    parser.add_argument("graph", type=Path, metavar="MODEL.onnx", help="graph written by sws-export")
    parser.add_argument("model", type=Path, metavar="MODEL", help="the checkpoint it was exported from")
    _add_checkpoint_options(parser)
    _add_output_options(parser)
    parsed = parser.parse_args(arguments)
    from sws_export.revalidate import validate
    from sws_export.terminal import print_validation

    progress, console = _progress(parsed)
    report = validate(parsed.graph, parsed.model, _checkpoint_options(parsed), progress)
    if not parsed.quiet:
        print_validation(console, report)
    if parsed.json:
        _print_json(report.as_dict())
    over = [output.name for output in report.outputs if not output.passed]
    if over:
        raise ValidationError(
            f"{parsed.graph} differs from the {report.reference} by more than is allowed: {', '.join(over)}; "
            "export it again"
        )
    return 0


def _plugins(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sws-export plugins", description="Build the library of TensorRT plugins, or say what it holds."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build", help="compile libsws_plugins.so, once for each state of its sources")
    build.add_argument("--architectures", metavar="N[,N…]", help="such as 89,90; default: all supported")
    build.add_argument("--output", type=Path, metavar="DIR", help="default: the user's cache")
    build.add_argument("--force", action="store_true", help="compile even if nothing changed")
    info = verbs.add_parser("info", help="where the library is, what it holds, for which architectures")
    info.add_argument("library", type=Path, nargs="?", help="default: the one that would be used")
    for verb in (build, info):
        _add_output_options(verb)
    parsed = parser.parse_args(arguments)
    from sws_export import plugin_build

    progress, _ = _progress(parsed)
    if parsed.verb == "build":
        chosen = parsed.architectures
        architectures = tuple(chosen.split(",")) if chosen else plugin_build.DEFAULT_ARCHITECTURES
        found = plugin_build.build_plugins(
            architectures=architectures, output=parsed.output, force=parsed.force, progress=progress
        )
    else:
        found = plugin_build.plugin_info(parsed.library)
    facts = dataclasses.asdict(found)
    if parsed.json:
        _print_json(facts)
    elif not parsed.quiet:
        from sws_export.terminal import print_facts

        print_facts(facts)
    return 0


def _checkpoint_options(parsed: argparse.Namespace) -> "ExportOptions":
    from sws_export.options import ExportOptions

    return ExportOptions(
        config=parsed.config,
        ema=parsed.ema,
        variant=parsed.variant,
        attention_head_dim=parsed.attention_head_dim,
        loras=tuple(parsed.lora),
    )


def _progress(parsed: argparse.Namespace) -> tuple["Progress", Any]:
    from sws_export.terminal import QuietProgress, TerminalProgress

    terminal = TerminalProgress()
    return (QuietProgress() if parsed.quiet else terminal), terminal.console


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values, indent=2, default=str))


if __name__ == "__main__":
    sys.exit(main())

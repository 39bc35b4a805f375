"""Options that several verbs have, and where they print."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from sws_export.options.options import ExportOptions
    from sws_export.progress import Progress


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """How to read a checkpoint, and what to fuse into it."""
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


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """What to print."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def checkpoint_options(parsed: argparse.Namespace) -> "ExportOptions":
    """The options of `add_checkpoint_options`."""
    from sws_export.options.options import ExportOptions

    return ExportOptions(
        config=parsed.config,
        ema=parsed.ema,
        variant=parsed.variant,
        attention_head_dim=parsed.attention_head_dim,
        loras=tuple(parsed.lora),
    )


def make_progress(parsed: argparse.Namespace) -> tuple["Progress", "Console"]:
    """Where progress goes, and the console for a summary; both write to stderr."""
    from sws_export.commands.terminal import QuietProgress, TerminalProgress

    terminal = TerminalProgress()
    return (QuietProgress() if parsed.quiet else terminal), terminal.console


def print_json(values: dict[str, Any]) -> None:
    """Print values on stdout."""
    print(json.dumps(values, indent=2, default=str))

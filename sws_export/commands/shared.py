"""Output that several verbs share: options, progress, and values as text or JSON."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from sws_export.progress import Progress


def printable(text: str) -> str:
    """`text` with control and formatting characters and lone surrogates as escapes such as `\\x1b`.

    Names in files reach the terminal through messages, and could move its cursor or hide text.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def print_line(text: str, *, error: bool = True) -> None:
    """Print a line on stderr or stdout, as `printable` returns it."""
    print(printable(text), file=sys.stderr if error else sys.stdout)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add `--json` and `--quiet`."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")


def add_host_code_option(parser: argparse.ArgumentParser) -> None:
    """Add `--engine-host-code-allowed`."""
    parser.add_argument(
        "--engine-host-code-allowed",
        action="store_true",
        help="run the native code that a TensorRT engine contains if it has plugins or is version-compatible",
    )


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """Add what determines an image beside prompt and seed: steps, guidance, sizes and `--no-pad`."""
    parser.add_argument("--steps", type=int, default=25, help="sampling steps; default: %(default)s")
    parser.add_argument("--guidance", type=float, default=5.0, help="guidance scale; default: %(default)s")
    parser.add_argument("--height", type=int, help="height in pixels; default: the training size of the UNet")
    parser.add_argument("--width", type=int, help="width in pixels; default: the training size of the UNet")
    parser.add_argument(
        "--no-pad",
        action="store_true",
        help="reject sizes that are not multiples of what the UNet takes, instead of padding and cropping",
    )


def make_progress(parsed: argparse.Namespace) -> tuple["Progress", "Console"]:
    """The progress of the terminal, and the console for a summary; both write to stderr."""
    from sws_export.commands.terminal import QuietProgress, TerminalProgress

    if parsed.quiet:
        # Read by huggingface_hub when it is imported.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    terminal = TerminalProgress()
    return (QuietProgress() if parsed.quiet else terminal), terminal.console


def print_json(values: Mapping[str, Any]) -> None:
    """Print values on stdout as JSON, which escapes all control characters but DEL."""
    print(json.dumps(values, indent=2, default=str).replace("\x7f", "\\u007f"))


def print_values(values: Mapping[str, Any], indent: int = 0) -> None:
    """Print nested values on stdout, one for each line."""
    margin = "  " * indent
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            print_line(f"{margin}{name}:", error=False)
            print_values(value, indent + 1)
        elif isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float)):
            print_line(f"{margin}{name}:", error=False)
            for item in value:
                print_line(f"{margin}  {_one_line(item)}", error=False)
        else:
            print_line(f"{margin}{name}: {_one_line(value)}", error=False)


def _one_line(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_one_line(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(_one_line(item) for item in value) or "none"
    return "unknown" if value is None else str(value)


class EscapedLog(logging.Handler):
    """Prints what libraries log on stderr, as `printable` returns it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        print_line(self.format(record))

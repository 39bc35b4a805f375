"""Output options that several verbs have."""

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from sws_export.progress import Progress


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add `--json` and `--quiet`."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")


def make_progress(parsed: argparse.Namespace) -> tuple["Progress", "Console"]:
    """The progress of the terminal, and the console for a summary; both write to stderr."""
    from sws_export.commands.terminal import QuietProgress, TerminalProgress

    terminal = TerminalProgress()
    return (QuietProgress() if parsed.quiet else terminal), terminal.console


def print_json(values: dict[str, Any]) -> None:
    """Print values on stdout."""
    print(json.dumps(values, indent=2, default=str))

"""`sws-export inspect FILE`: describe a file."""

import argparse
from pathlib import Path

from sws_export.commands.shared import print_json, print_values


def run(arguments: list[str]) -> int:
    """Describe a file on stdout."""
    parser = argparse.ArgumentParser(
        prog="sws-export inspect", description="Describe an engine, graph, manifest or checkpoint."
    )
    parser.add_argument("file", type=Path, help="engine, ONNX graph, manifest, checkpoint or model directory")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parsed = parser.parse_args(arguments)
    from sws_export.inspection import inspect_file

    description = inspect_file(parsed.file)
    if parsed.json:
        print_json(description)
    else:
        print_values(description)
    return 0

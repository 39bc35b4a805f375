"""`sws-export inspect FILE`: what a file is."""

import argparse
from pathlib import Path

from sws_export.commands.shared import print_facts, print_json


def run(arguments: list[str]) -> int:
    """Describe a file on stdout."""
    parser = argparse.ArgumentParser(prog="sws-export inspect", description="Say what a file is.")
    parser.add_argument("file", type=Path, help="engine, ONNX graph, manifest, checkpoint or model directory")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parsed = parser.parse_args(arguments)
    from sws_export.inspection import inspect_file

    facts = inspect_file(parsed.file)
    if parsed.json:
        print_json(facts)
    else:
        print_facts(facts)
    return 0

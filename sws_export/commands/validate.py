"""`sws-export validate MODEL.onnx MODEL`: compare again."""

import argparse
from pathlib import Path

from sws_export.commands.shared import add_output_options, make_progress, print_json
from sws_export.errors import ValidationError
from sws_export.options import SourceOptions
from sws_export.options.arguments import group_from_arguments


def run(arguments: list[str]) -> int:
    """Compare a graph with its checkpoint."""
    parser = argparse.ArgumentParser(
        prog="sws-export validate",
        description="Compare an exported graph with the eager reference on its checkpoint.",
    )
    parser.add_argument("graph", type=Path, metavar="MODEL.onnx", help="graph written by sws-export")
    parser.add_argument("model", type=Path, metavar="MODEL", help="the checkpoint it was exported from")
    SourceOptions.add_reading_arguments(parser)
    add_output_options(parser)
    parsed = parser.parse_args(arguments)
    from sws_export.commands.terminal import print_validation
    from sws_export.pipeline.validate import validate

    progress, console = make_progress(parsed)
    options = group_from_arguments(SourceOptions, parsed)
    report = validate(parsed.graph, parsed.model, options, progress)
    if not parsed.quiet:
        print_validation(console, report)
    if parsed.json:
        print_json(report.as_dict())
    over = [output.name for output in report.outputs if not output.passed]
    if over:
        raise ValidationError(
            f"{parsed.graph} differs from the {report.reference} by more than is allowed: {', '.join(over)}; "
            "export it again"
        )
    return 0

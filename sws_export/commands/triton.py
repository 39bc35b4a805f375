"""`sws-export triton ARTEFACT`: a model repository for Triton Inference Server."""

import argparse
import sys
from pathlib import Path

from sws_export.commands.shared import add_output_options, print_json


def run(arguments: list[str]) -> int:
    """Add an artefact to a model repository."""
    parser = argparse.ArgumentParser(
        prog="sws-export triton", description="Write a Triton model repository with the state kept by Triton."
    )
    parser.add_argument("artefact", type=Path, help="graph or engine, with its manifest")
    parser.add_argument("--repository", type=Path, required=True, metavar="DIR", help="model repository")
    parser.add_argument("--name", help="of the model; default: that of the artefact")
    parser.add_argument(
        "--variant",
        choices=("native", "python"),
        default="native",
        help="Triton's own backend, or a Session in its Python backend; default: %(default)s",
    )
    parser.add_argument("--height", type=int, help="of the latent; default: the best of the profile")
    parser.add_argument("--width", type=int, help="of the latent; default: the best of the profile")
    parser.add_argument("--tokens", type=int, help="of the text; default: the best of the profile, or any")
    parser.add_argument("--max-batch", type=int, help="sequences in one batch")
    add_output_options(parser)
    parsed = parser.parse_args(arguments)
    from sws_export.adapters.triton.repository import TritonOptions, write_repository

    options = TritonOptions(
        name=parsed.name,
        variant=parsed.variant,
        height=parsed.height,
        width=parsed.width,
        tokens=parsed.tokens,
        max_batch=parsed.max_batch,
    )
    files = write_repository(parsed.artefact, parsed.repository, options)
    if parsed.json:
        print_json({"files": [str(file) for file in files]})
    elif not parsed.quiet:
        for file in files:
            print(f"wrote {file}", file=sys.stderr)
    return 0

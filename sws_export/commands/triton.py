"""`sws-export triton ARTEFACT`: a model repository for NVIDIA Triton Inference Server."""

import argparse
from pathlib import Path

from sws_export.commands.shared import add_host_code_option, add_output_options, print_json, print_line


def run(arguments: list[str]) -> int:
    """Add an artefact to a model repository."""
    parser = argparse.ArgumentParser(
        prog="sws-export triton",
        description="Add an artefact to a Triton model repository.",
    )
    parser.add_argument("artefact", type=Path, help="graph or engine, with its manifest")
    parser.add_argument("--repository", type=Path, required=True, metavar="DIR", help="model repository")
    parser.add_argument("--name", help="name of the model; default: name of the artefact")
    parser.add_argument(
        "--variant",
        choices=("native", "python"),
        default="native",
        help="the ONNX Runtime or TensorRT backend of Triton, or a Session in the Python backend; "
        "default: %(default)s",
    )
    parser.add_argument("--height", type=int, help="height of the latent; default: opt of the profile")
    parser.add_argument("--width", type=int, help="width of the latent; default: opt of the profile")
    parser.add_argument("--tokens", type=int, help="text tokens; default: opt of the profile, or dynamic")
    parser.add_argument("--max-batch", type=int, help="largest number of sequences in one batch")
    add_host_code_option(parser)
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
        engine_host_code_allowed=parsed.engine_host_code_allowed,
    )
    files = write_repository(parsed.artefact, parsed.repository, options)
    if parsed.json:
        print_json({"files": [str(file) for file in files]})
    elif not parsed.quiet:
        for file in files:
            print_line(f"wrote {file}")
    return 0

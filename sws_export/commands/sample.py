"""`sws-export sample ARTEFACT PIPELINE`: images with and without SWS."""

import argparse
import dataclasses
from pathlib import Path

from sws_export.commands.shared import (
    add_drawing_options,
    add_host_code_option,
    add_output_options,
    make_progress,
    print_json,
    print_line,
)


def run(arguments: list[str]) -> int:
    """Sample a pipeline with an exported UNet and write one image with all samples."""
    parser = argparse.ArgumentParser(
        prog="sws-export sample", description="Sample images with and without SWS from the same seeds."
    )
    parser.add_argument("artefact", type=Path, help="graph or engine, with its manifest")
    parser.add_argument("pipeline", type=Path, help="diffusers pipeline directory of the UNet")
    parser.add_argument("--out", type=Path, required=True, help="PNG file with all images side by side")
    parser.add_argument("--prompt", action="append", required=True, help="a row of images; repeatable")
    parser.add_argument(
        "--seed", action="append", type=int, help="a group of columns; repeatable; default: 0"
    )
    parser.add_argument(
        "--intensity",
        action="append",
        type=float,
        help="a column, the strength of SWS; repeatable; default: 0, 0.5 and 1",
    )
    add_drawing_options(parser)
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="allow the pipeline.py of the directory, if any, to be executed",
    )
    add_host_code_option(parser)
    parser.add_argument(
        "--beside",
        action="append",
        type=Path,
        default=[],
        metavar="ARTEFACT",
        help="draw the images of another artefact, too, such as one with 8-bit weights; repeatable",
    )
    add_output_options(parser)
    parsed = parser.parse_args(arguments)
    from sws_export.commands.terminal import print_effects
    from sws_export.sampling.sample import SampleOptions, sample_pipeline

    progress, console = make_progress(parsed)
    options = SampleOptions(
        prompts=tuple(parsed.prompt),
        seeds=tuple(parsed.seed or (0,)),
        intensities=tuple(parsed.intensity or (0.0, 0.5, 1.0)),
        steps=parsed.steps,
        guidance=parsed.guidance,
        height=parsed.height,
        width=parsed.width,
        pad=not parsed.no_pad,
        trust_code=parsed.trust_code,
        engine_host_code_allowed=parsed.engine_host_code_allowed,
        beside=tuple(parsed.beside),
    )
    effects = sample_pipeline(parsed.artefact, parsed.pipeline, parsed.out, options, progress)
    if parsed.json:
        print_json({"file": str(parsed.out), "effects": [dataclasses.asdict(effect) for effect in effects]})
    elif not parsed.quiet:
        print_effects(console, effects)
        print_line(f"wrote {parsed.out}")
    return 0

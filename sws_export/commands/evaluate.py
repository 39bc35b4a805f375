"""`sws-export evaluate ARTEFACT PIPELINE`: metrics of images with and without SWS, with intervals."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sws_export.commands.shared import (
    add_drawing_options,
    add_host_code_option,
    add_output_options,
    make_progress,
    print_json,
    print_line,
)

if TYPE_CHECKING:
    from rich.table import Table

    from sws_export.evaluation.measure import Summary


def run(arguments: list[str]) -> int:
    """Draw pairs of images that differ in the intensity, measure them, and write JSON and a page."""
    parser = argparse.ArgumentParser(
        prog="sws-export evaluate",
        description="Measure what SWS changes in the images of a pipeline: sharpness, spectrum, structure, "
        "stability over steps and frames, prompt adherence. An interrupted run is continued by the same "
        "command.",
    )
    parser.add_argument("artefact", type=Path, help="graph or engine with SWS, with its manifest")
    parser.add_argument("pipeline", type=Path, help="diffusers pipeline directory of the UNet")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="prompts, one per line")
    parser.add_argument(
        "--seeds", type=int, required=True, metavar="N", help="draw each prompt with the seeds 0 to N - 1"
    )
    parser.add_argument(
        "--frames",
        type=int,
        default=1,
        metavar="F",
        help="frames of a slow walk through the noise of each pair, to measure flicker; default: none",
    )
    parser.add_argument(
        "--clip", type=Path, metavar="DIR", help="directory of a CLIP model, to measure prompt adherence"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="directory of the results; default: the name of the artefact with .evaluation",
    )
    add_drawing_options(parser)
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="allow the pipeline.py and check.py of the directory, if any, to be executed",
    )
    add_host_code_option(parser)
    add_output_options(parser)
    parsed = parser.parse_args(arguments)
    from sws_export.evaluation.evaluate import DOCUMENT, PAGE, evaluate
    from sws_export.evaluation.options import EvaluationOptions
    from sws_export.options.prompts import read_prompts
    from sws_export.sampling.draw import Drawing

    progress, console = make_progress(parsed)
    options = EvaluationOptions(
        prompts=tuple(read_prompts(parsed.prompts)),
        seeds=parsed.seeds,
        frames=parsed.frames,
        clip=parsed.clip,
        drawing=Drawing(parsed.steps, parsed.guidance, parsed.height, parsed.width),
        pad=not parsed.no_pad,
        trust_code=parsed.trust_code,
        engine_host_code_allowed=parsed.engine_host_code_allowed,
    )
    out = parsed.out or parsed.artefact.with_name(f"{parsed.artefact.name}.evaluation")
    document, summary = evaluate(parsed.artefact, parsed.pipeline, out, options, progress)
    if parsed.json:
        print_json({"files": [str(out / name) for name in (DOCUMENT, PAGE)]} | document)
    elif not parsed.quiet:
        console.print(_table(summary))
        print_line(f"wrote {out / PAGE} and {out / DOCUMENT}")
    return 0


def _table(summary: "Summary") -> "Table":
    """The plain value of each metric, and its changes at intensities 0.5 and 1."""
    from rich.table import Table

    from sws_export.evaluation.measure import METRICS
    from sws_export.evaluation.page import change_texts, number

    table = Table("metric", "at 0", "at 0.5", "at 1", box=None, header_style="dim", pad_edge=False)
    for name, found in summary.metrics.items():
        changes = [text for text, _ in change_texts(name, summary)]
        table.add_row(METRICS[name].title, number(found.values[0]), changes[1], changes[3])
    return table

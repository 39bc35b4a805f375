"""`sws-export report ARTEFACT [MODEL]`: an HTML report of SWS during sampling."""

import argparse
from pathlib import Path

from sws_export.commands.shared import (
    add_host_code_option,
    add_output_options,
    make_progress,
    print_json,
    print_line,
)


def run(arguments: list[str]) -> int:
    """Sample with an exported UNet and write an HTML report with the metrics of each site and step."""
    parser = argparse.ArgumentParser(
        prog="sws-export report", description="Write an HTML report of SWS at each sampling step."
    )
    parser.add_argument("artefact", type=Path, help="graph or engine, with its manifest")
    parser.add_argument(
        "model",
        type=Path,
        nargs="?",
        help="the checkpoint it was exported from; optional for an artefact with debug outputs",
    )
    parser.add_argument("--out", type=Path, required=True, help="self-contained HTML file")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps; default: %(default)s")
    parser.add_argument("--intensity", type=float, default=0.5, help="strength of SWS; default: %(default)s")
    parser.add_argument("--height", type=int, help="height of the latent")
    parser.add_argument("--width", type=int, help="width of the latent")
    parser.add_argument(
        "--token",
        action="append",
        type=_position,
        metavar="DOWN,RIGHT",
        help="relative position of a token whose transport is drawn, such as 0.5,0.25; repeatable; "
        "default: centre, edge and corner",
    )
    add_host_code_option(parser)
    add_output_options(parser)
    parsed = parser.parse_args(arguments)
    from sws_export.report.report import TOKENS, write_report
    from sws_export.runtime import Session

    progress, _ = make_progress(parsed)
    write_report(
        Session.load(parsed.artefact, engine_host_code_allowed=parsed.engine_host_code_allowed),
        parsed.model,
        parsed.out,
        steps=parsed.steps,
        intensity=parsed.intensity,
        height=parsed.height,
        width=parsed.width,
        tokens={f"{down:g}, {right:g}": (down, right) for down, right in parsed.token or ()} or TOKENS,
        progress=progress,
    )
    if parsed.json:
        print_json({"file": str(parsed.out)})
    elif not parsed.quiet:
        print_line(f"wrote {parsed.out}")
    return 0


def _position(text: str) -> tuple[float, float]:
    try:
        down, right = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected DOWN,RIGHT, such as 0.5,0.25, found '{text}'") from None
    return down, right

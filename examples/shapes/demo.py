"""Pictures with and without SWS, side by side.

    python -m examples.shapes.demo out/shapes.onnx --out out/shapes.png

Samples the shapes model from the same seeds and prompts at several intensities, writes one PNG with all of
them and with the difference that SWS makes, and prints how large that is.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.shapes import prompts
from sws_export.errors import SwsExportError
from sws_export.runtime import Session
from sws_export.runtime.picture_grid import save_picture
from sws_export.runtime.pipeline_sampling import comparison_sheet
from sws_export.runtime.sampling import Effect, Floats, Sampled, measure, sample, seeded_noise

HERE = Path(__file__).resolve().parent
SIDE = 32
PROMPTS = (
    "red circle center",
    "blue cross top and white square bottom",
    "green triangle left and yellow circle right",
    "",
)
SEEDS = (1, 2)
INTENSITIES = (0.0, 0.5, 1.0)
SCALE = 3


def main() -> None:
    arguments = _parse()
    try:
        told = prompts.embed_all([prompt for prompt in arguments.prompt for _ in SEEDS])
        session = Session.load(arguments.artefact)
        runs = [
            _sample(session, told, intensity, arguments.steps, arguments.guidance)
            for intensity in INTENSITIES
        ]
        sheet = comparison_sheet(runs, arguments.prompt, SEEDS, arguments.steps, SCALE)
        save_picture(sheet, arguments.out)
    except (SwsExportError, prompts.PromptError) as error:
        sys.exit(f"demo: {error}")
    for line in _table([measure(run, runs[0]) for run in runs]):
        print(line, file=sys.stderr)
    print(arguments.out)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "artefact", type=Path, help="what sws-export made of this model, .onnx (or .plan on a GPU)"
    )
    parser.add_argument("--out", type=Path, default=Path("shapes.png"))
    parser.add_argument("--prompt", nargs="+", default=list(PROMPTS), help="for example 'red circle left'")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=3.0)
    return parser.parse_args()


def _sample(session: Session, told: Floats, intensity: float, steps: int, guidance: float) -> Sampled:
    """A picture for each text in `told`, which has every prompt once for each seed, all as one batch."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler.from_pretrained(HERE, subfolder="scheduler")
    channels = session.contract.prediction.shape[1]
    seeds = SEEDS * (len(told) // len(SEEDS))
    noise = seeded_noise(seeds, (int(channels), SIDE, SIDE))
    counter = itertools.count(1)

    def report() -> None:
        done = next(counter)
        if sys.stderr.isatty():
            end = "\n" if done == steps else ""
            print(f"\rintensity {intensity:g}: step {done} of {steps}", end=end, file=sys.stderr)

    return sample(
        session,
        scheduler,
        noise,
        told,
        prompts.embed(""),
        intensity=intensity,
        steps=steps,
        guidance=guidance,
        on_step=report,
    )


def _table(effects: Sequence[Effect]) -> list[str]:
    lines = ["intensity  difference  sharpness  step-to-step change   (pictures are in [-1, 1])"]
    for effect in effects:
        numbers = f"{effect.difference:10.4f}  {effect.sharpness:9.4f}  {effect.step_change:19.4f}"
        lines.append(f"{effect.intensity:9.2f}  {numbers}")
    return lines


if __name__ == "__main__":
    main()

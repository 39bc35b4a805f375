"""Sampling a diffusers pipeline, with an artefact as its UNet, with and without SWS."""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sws_export.errors import OptionError
from sws_export.extras import missing_extras_as_errors
from sws_export.presets import recorded_preset
from sws_export.progress import Progress, SilentProgress, Stage
from sws_export.runtime.contract import Contract

with missing_extras_as_errors():
    from PIL import Image

    from sws_export.sampling.draw import Drawing, attach_artefact, check_pixels, draw, load_pipeline
    from sws_export.sampling.effects import Effect, Floats, Sampled, measure
    from sws_export.sampling.image_grid import draw_grid, save_image, to_image
    from sws_export.sampling.predicted_image import check_prediction, recorded_steps

_LARGEST_SHOWN = 0.8
# The largest changes are clipped, so that the others are visible.
_SHOWN_QUANTILE = 0.99
_NARROWEST, _WIDEST = 96, 256


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """What to sample.

    Attributes:
        prompts: One row of images each.
        seeds: One group of columns each.
        intensities: One column of each group; the others are compared with the first.
        steps: Steps of the scheduler.
        guidance: Scale of classifier-free guidance.
        height: Pixels; None is the size that the UNet was trained on.
        width: Pixels; None as for `height`.
        pad: Pad latents to the next size that the UNet takes, and crop.
        trust_code: Import `pipeline.py` of the pipeline directory if diffusers does not have its class.
        engine_host_code_allowed: See `Session.load`.
        beside: Further artefacts of the same UNet, such as one with 8-bit weights, drawn side by side.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    intensities: tuple[float, ...] = (0.0, 0.5, 1.0)
    steps: int = 25
    guidance: float = 5.0
    height: int | None = None
    width: int | None = None
    pad: bool = True
    trust_code: bool = False
    engine_host_code_allowed: bool = False
    beside: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds", "intensities"):
            if not getattr(self, name):
                raise OptionError(f"nothing to sample: give at least one of {name}")
        for intensity in self.intensities:
            if not 0.0 <= intensity <= 1.0:
                raise OptionError(f"intensity {intensity:g} is out of range; allowed is 0 to 1")
        self.drawing.check()

    @property
    def drawing(self) -> Drawing:
        """How each image is drawn."""
        return Drawing(self.steps, self.guidance, self.height, self.width)


def sample_pipeline(
    artefact: Path, pipeline: Path, out: Path, options: SampleOptions, progress: Progress | None = None
) -> list[Effect]:
    """Write a PNG with the images of `sample_images`, and measure the effect of SWS.

    Args:
        artefact: Exported from the UNet of `pipeline`.
        pipeline: A diffusers pipeline directory; its UNet is not loaded, and nothing is downloaded.
        out: The PNG.
        options: What to sample.
        progress: Receives each image.

    Returns:
        One entry for each artefact and intensity.

    Raises:
        SwsExportError: A file is missing, the artefact does not fit the pipeline, or the PNG cannot be
            written.
    """
    runs = sample_images(artefact, pipeline, options, progress)
    effects = [measure(run, runs[0]) for run in runs]
    save_image(comparison_sheet(runs, effects, options.prompts, options.seeds, options.steps), out)
    return effects


def sample_images(
    artefact: Path, pipeline: Path, options: SampleOptions, progress: Progress | None = None
) -> list[Sampled]:
    """The images of every prompt, seed and intensity: a run for each artefact and intensity.

    Images of one prompt and seed start from the same noise. They are sampled one at a time, each with a zero
    state, also if the state of the artefact is persistent. See `sample_pipeline` for the arguments.

    Raises:
        SwsExportError: A file is missing, or the artefact does not fit the pipeline.
    """
    progress = progress or SilentProgress()
    pipe = load_pipeline(pipeline, trust_code=options.trust_code)
    files = (artefact, *options.beside)
    total = len(files) * len(options.prompts) * len(options.seeds) * len(options.intensities)
    runs: list[Sampled] = []
    check_pixels(pipe, options.drawing)
    with progress.stage("sample", total=total) as stage:
        for file in files:
            unet = attach_artefact(
                pipe,
                file,
                pipeline,
                progress,
                pad=options.pad,
                engine_host_code_allowed=options.engine_host_code_allowed,
            )
            measured = _is_measured(pipe, progress)
            runs += _sample(pipe, unet, file.name if options.beside else "", options, measured, stage)
    return runs


def _sample(
    pipe: Any, unet: Any, name: str, options: SampleOptions, measured: bool, stage: Stage
) -> list[Sampled]:
    """The images of one artefact, a run for each intensity; with `measured`, also the step-to-step change."""
    runs = []
    plain_at_zero = is_plain_at_zero(unet.session.contract)
    for intensity in options.intensities:
        images, changes = [], []
        for prompt, seed in itertools.product(options.prompts, options.seeds):
            stage.describe(f"{name} intensity {intensity:g}: {prompt}".strip())
            unet.reset()
            image, moved = _one(pipe, prompt, seed, intensity, options.drawing, measured)
            images.append(image)
            changes += [] if moved is None else [moved]
            stage.advance()
        label = "plain" if intensity == 0 and plain_at_zero else f"SWS {intensity:g}"
        moves = np.stack(changes, axis=1) if changes else None
        runs.append(Sampled(intensity, np.stack(images), moves, name, label))
    return runs


def is_plain_at_zero(contract: Contract) -> bool:
    """Whether a graph at intensity 0 is the plain UNet at every noise level."""
    preset = recorded_preset(contract.manifest)
    return preset is None or preset.plain_at_zero


def comparison_sheet(
    runs: Sequence[Sampled],
    effects: Sequence[Effect],
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
) -> Image.Image:
    """Images of `runs` side by side, with the amplified change from the first run to the last.

    Args:
        runs: Images in [-1, 1], in the order of the prompts, and of the seeds within a prompt.
        effects: Metrics of each run, printed at the bottom.
        prompts: One row each.
        seeds: One group of columns each.
        steps: Number of steps, for the title.
    """
    scale = max(1, _NARROWEST // runs[0].images.shape[-1])
    change = runs[-1].images - runs[0].images
    enlarged = max(1, int(_LARGEST_SHOWN / max(float(np.quantile(np.abs(change), _SHOWN_QUANTILE)), 1e-6)))
    shown = [*(run.images for run in runs), change * enlarged]
    rows = []
    for row, prompt in enumerate(prompts):
        numbers = range(row * len(seeds), (row + 1) * len(seeds))
        rows.append((prompt or "(no prompt)", [_shown(each[n], scale) for n in numbers for each in shown]))
    labels = [f"{run.artefact} {run.label}".strip() for run in runs]
    groups = [f"seed {seed}" for seed in seeds]
    title = f"The same seeds without and with SWS, {steps} steps"
    notes = [
        f"{label}: differs by {effect.difference:.4f}, sharpness {effect.sharpness:.4f}"
        + ("" if effect.step_change is None else f", step-to-step change {effect.step_change:.4f}")
        for label, effect in zip(labels, effects, strict=True)
    ]
    return draw_grid(rows, [*labels, f"change x {enlarged}"], groups, title, notes)


def _shown(values: Floats, scale: int) -> Image.Image:
    image = to_image(values, scale)
    image.thumbnail((_WIDEST, _WIDEST))
    return image


def _one(
    pipe: Any, prompt: str, seed: int, intensity: float, drawing: Drawing, measured: bool
) -> tuple[Floats, Floats | None]:
    """One image [3, H, W] in [-1, 1], and the change of the predicted image at each step but the first."""
    with recorded_steps(pipe.scheduler) if measured else contextlib.nullcontext() as record:
        image = draw(pipe, prompt, seed, intensity, drawing)
    moved = None if record is None else np.asarray([change[0] for change in record.changes], np.float32)
    return np.asarray(image.transpose(2, 0, 1) * 2 - 1, np.float32), moved


def _is_measured(pipe: Any, progress: Progress) -> bool:
    """Whether the predicted image of a step is known; a warning if not: the images are drawn anyway."""
    try:
        check_prediction(pipe.scheduler)
    except OptionError as error:
        progress.warn(f"{error}; the step-to-step change is not measured")
        return False
    return True

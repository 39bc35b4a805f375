"""A diffusers pipeline with an artefact as its UNet, and one image of it."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sws_export.calibration.pipeline_class import check_components, pipeline_class
from sws_export.checkpoint.config import read_json
from sws_export.errors import CheckpointError, OptionError
from sws_export.progress import Progress
from sws_export.sampling.effects import Floats
from sws_export.tensors import nearest_multiples

if TYPE_CHECKING:
    from sws_export.adapters.diffusers import SWSUNet


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How an image is drawn.

    Attributes:
        steps: Steps of the scheduler.
        guidance: Scale of classifier-free guidance.
        height: Pixels; None is the size that the UNet was trained on.
        width: Pixels; None as for `height`.
    """

    steps: int = 25
    guidance: float = 5.0
    height: int | None = None
    width: int | None = None

    def check(self) -> None:
        """Raise OptionError for a number of steps below 1."""
        if self.steps < 1:
            raise OptionError(f"steps {self.steps} is out of range; at least 1 is needed")


def load_pipeline(pipeline: Path, *, trust_code: bool) -> Any:
    """The pipeline without its UNet.

    Raises:
        CheckpointError: The directory is no pipeline, or diffusers cannot load it.
        OptionError: Its class is in its own code, which is not trusted.
    """
    from diffusers.utils import logging

    kind = pipeline_class(pipeline, trust_code=trust_code)
    check_components(pipeline, own_code=not kind.__module__.startswith("diffusers."))
    # Our own progress replaces it.
    logging.disable_progress_bar()
    try:
        pipe = kind.from_pretrained(
            pipeline, unet=None, local_files_only=True, low_cpu_mem_usage=False, use_safetensors=True
        )
    except Exception as error:  # configurations and weights of components can be malformed in many ways
        raise CheckpointError(f"diffusers cannot load the pipeline {pipeline}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def attach_artefact(
    pipe: Any, artefact: Path, pipeline: Path, progress: Progress, **session_options: Any
) -> "SWSUNet":
    """Load an artefact as the UNet of `pipe`; what had to be changed to fit it is a warning.

    Args:
        pipe: Of `load_pipeline`.
        artefact: Graph or engine.
        pipeline: Directory of `pipe`.
        progress: Receives the warnings.
        session_options: See `Session.load`.
    """
    from sws_export.adapters.diffusers import SWSUNet
    from sws_export.adapters.fit_pipeline import fit_pipeline

    config: dict[str, Any] = read_json(pipeline / "unet" / "config.json", dict[str, Any])
    unet = SWSUNet.load(artefact, config=config, **session_options)
    for change in fit_pipeline(pipe, unet.session.contract.manifest["source"]):
        progress.warn(change)
    return unet.attach(pipe)


def check_pixels(pipe: Any, drawing: Drawing) -> None:
    """Reject sizes that the VAE cannot decode, before the pipeline does without naming others."""
    scale = getattr(pipe, "vae_scale_factor", 1)
    for name in ("height", "width"):
        size = getattr(drawing, name)
        if size is not None and (size % scale or size < 1):
            nearest = " or ".join(map(str, nearest_multiples(max(size, 0), scale)))
            raise OptionError(
                f"--{name} {size}: expected a multiple of {scale} pixels, such as {nearest}, found {size}"
            )


def draw(
    pipe: Any,
    prompt: str,
    seed: int,
    intensity: float,
    drawing: Drawing,
    *,
    latents: Any = None,
) -> Floats:
    """One image [H, W, C] in [0, 1].

    Args:
        pipe: A pipeline with an artefact as its UNet.
        prompt: The prompt.
        seed: Of the initial noise, and of a scheduler that adds noise.
        intensity: Strength of SWS.
        drawing: Steps, guidance and size.
        latents: Initial noise of standard deviation 1, [1, C, H, W]; None draws it from `seed`.

    Raises:
        OptionError: The pipeline rejects the prompt, size or number of steps.
    """
    import torch

    noise = {} if latents is None else {"latents": latents}
    try:
        (drawn,) = pipe(
            prompt,
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance,
            height=drawing.height,
            width=drawing.width,
            generator=torch.Generator().manual_seed(seed),
            cross_attention_kwargs={"intensity": intensity},
            output_type="np",
            **noise,
        ).images
    except ValueError as error:
        # Pipelines raise it for invalid sizes, prompts and numbers of steps.
        raise OptionError(f"the pipeline rejects the options: {error}") from error
    image: Floats = drawn
    return image

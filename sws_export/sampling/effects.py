"""Metrics of the effect of SWS on sampled images."""

import dataclasses

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One sampling run.

    Attributes:
        intensity: Strength of SWS.
        images: Images, [N, C, H, W] in [-1, 1].
        changes: Root mean square change of the predicted image from one step to the next, [steps - 1, N],
            in the units of the latents; None if it is unknown.
        artefact: File name of the artefact if there are several; else empty.
        label: How this run is called beside others.
    """

    intensity: float
    images: Floats
    changes: Floats | None
    artefact: str = ""
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Effect:
    """Metrics of the images of one run, averaged over the images.

    Attributes:
        intensity: Strength of SWS.
        difference: Root mean square difference from the images of the first run.
        sharpness: Mean length of the gradient, per pixel.
        step_change: Mean of `Sampled.changes`; None if they are unknown or there is one step.
        artefact: As in `Sampled`.
    """

    intensity: float
    difference: float
    sharpness: float
    step_change: float | None
    artefact: str = ""


def measure(run: Sampled, plain: Sampled) -> Effect:
    """Metrics of `run`; `plain` was sampled from the same noise and prompts at intensity 0."""
    return Effect(
        intensity=run.intensity,
        difference=float(_rms(run.images - plain.images).mean()),
        sharpness=sharpness(run.images),
        step_change=None if run.changes is None or run.changes.size == 0 else float(run.changes.mean()),
        artefact=run.artefact,
    )


def sharpness(images: Floats) -> float:
    """Mean length of the gradient, from differences to the right and lower neighbour."""
    right = np.diff(images, axis=-1)[..., :-1, :]
    down = np.diff(images, axis=-2)[..., :, :-1]
    return float(np.hypot(right, down).mean())


def _rms(images: Floats) -> Floats:
    """Root mean square of each image, [N]."""
    return np.asarray(np.sqrt(np.square(images).mean(axis=(1, 2, 3))), np.float32)

"""How far SWS changes what sampling gives."""

import dataclasses

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One sampling run.

    Attributes:
        intensity: Strength of SWS that it was run with.
        pictures: What came out, [N, C, H, W] in [-1, 1].
        changes: How far the latents moved from one step to the next, root mean square over each picture,
            [steps - 1, N].
    """

    intensity: float
    pictures: Floats
    changes: Floats


@dataclasses.dataclass(frozen=True)
class Effect:
    """What SWS did to a set of pictures, mean over all of them.

    Attributes:
        intensity: Strength of SWS.
        difference: Root mean square of the difference to the pictures without SWS.
        sharpness: Mean length of the gradient, a pixel.
        step_change: Mean of `Sampled.changes`, in the units of the latents.
    """

    intensity: float
    difference: float
    sharpness: float
    step_change: float


def measure(run: Sampled, plain: Sampled) -> Effect:
    """What `run` has against `plain`, which was sampled from the same noise and prompts at intensity 0."""
    return Effect(
        intensity=run.intensity,
        difference=float(_rms(run.pictures - plain.pictures).mean()),
        sharpness=sharpness(run.pictures),
        step_change=float(run.changes.mean()),
    )


def sharpness(pictures: Floats) -> float:
    """Mean length of the gradient, by differences to the right and downward neighbour."""
    right = np.diff(pictures, axis=-1)[..., :-1, :]
    down = np.diff(pictures, axis=-2)[..., :, :-1]
    return float(np.hypot(right, down).mean())


def _rms(pictures: Floats) -> Floats:
    """Root mean square of each picture, [N]."""
    return np.asarray(np.sqrt(np.square(pictures).mean(axis=(1, 2, 3))), np.float32)

"""Sampling with a session, and how far SWS changes what comes out."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sws_export.runtime.session import Stream

Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One sampling run.

    Attributes:
        intensity: Strength of SWS that it was run with.
        pictures: What came out, as the model has it, [N, C, H, W].
        changes: How far the prediction of the finished picture moved from one step to the next, root mean
            square over each picture, [steps - 1, N].
    """

    intensity: float
    pictures: Floats
    changes: Floats


@dataclasses.dataclass(frozen=True)
class Effect:
    """What SWS did to a set of pictures, in the units of the pictures, mean over all of them.

    Attributes:
        intensity: Strength of SWS.
        difference: Root mean square of the difference to the pictures without SWS.
        sharpness: Mean length of the gradient, a pixel.
        step_change: Mean of `Sampled.changes`: small where sampling goes straight to its result.
    """

    intensity: float
    difference: float
    sharpness: float
    step_change: float


def sample(
    stream: Stream,
    scheduler: Any,
    noise: Floats,
    told: Floats,
    untold: Floats,
    *,
    intensity: float,
    steps: int,
    guidance: float,
    on_step: Callable[[], None] = lambda: None,
) -> Sampled:
    """Euler's method with classifier-free guidance, both halves of it in one batch.

    Args:
        stream: What predicts the noise; its state is reset first.
        scheduler: A diffusers `EulerDiscreteScheduler`.
        noise: Standard normal, [N, C, H, W].
        told: Text embeddings of the prompts, [N, L, X].
        untold: Text embedding of the empty prompt, [L, X].
        intensity: Strength of SWS in [0, 1].
        steps: Number of steps.
        guidance: Scale of the guidance; 1 is none.
        on_step: Called after each step.
    """
    import torch

    scheduler.set_timesteps(steps)
    stream.reset()
    texts = np.concatenate([told, np.broadcast_to(untold, told.shape)])
    latents = torch.from_numpy(noise) * scheduler.init_noise_sigma
    finished = []
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        scaled = scheduler.scale_model_input(latents, timestep)
        both = stream.step(
            torch.cat([scaled, scaled]), float(timestep), texts, sigma=float(sigma), intensity=intensity
        )
        with_text, without_text = both.chunk(2)
        prediction = without_text + guidance * (with_text - without_text)
        moved = scheduler.step(prediction, timestep, latents)
        latents = moved.prev_sample
        finished.append(moved.pred_original_sample.numpy())
        on_step()
    changes = [_rms(after - before) for before, after in itertools.pairwise(finished)]
    return Sampled(intensity, latents.numpy(), np.array(changes, np.float32).reshape(-1, len(noise)))


def seeded_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Floats:
    """Standard normal noise [len(seeds), C, H, W]; each picture depends on its own seed alone."""
    drawn = [np.random.default_rng(seed).standard_normal(shape) for seed in seeds]
    return np.stack(drawn).astype(np.float32)


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

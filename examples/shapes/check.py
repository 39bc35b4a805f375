"""Do samples obey their prompts, and is attention peaked: `nice python -m examples.shapes.check`.

Draws samples of random prompts, recognises what is on them by the nearest rendering, and prints the shares
that are right, with the entropy of self-attention of trained and of random weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# Relative, so that `sws-export evaluate` imports it from wherever the folder lies.
from . import prompts, scenes
from .scenes import Scene, SceneObject

Floats = npt.NDArray[np.float32]
_HALF_CELL = 5


class Accuracy(NamedTuple):
    """Shares in [0, 1]; of the objects in the prompts, and (`exact`) of the whole images."""

    position: float  # there is an object at the position of the prompt
    colour: float  # ... and has its colour
    shape: float  # ... and has its shape
    exact: float  # every object of the image is right, none is missing and none is too many


def recognise(image: Floats) -> frozenset[SceneObject]:
    """What is on a image, float32 [3, 32, 32] in [-1, 1]: at each place the nearest rendering, if any."""
    found = []
    for position in scenes.POSITIONS:
        candidates, renderings = _renderings(position)
        distance = np.square(renderings - _cell(image, position).ravel()).sum(axis=1)
        nearest = candidates[int(distance.argmin())]
        if nearest is not None:
            found.append(nearest)
    return frozenset(found)


def accuracy(wanted: Sequence[Scene], images: Floats) -> Accuracy:
    """How far images float32 [N, 3, 32, 32] show the N scenes of their prompts."""
    position, colour, shape, exact = [], [], [], []
    for scene, image in zip(wanted, images, strict=True):
        seen = recognise(image)
        there = {thing.position: thing for thing in seen}
        for thing in scene:
            other = there.get(thing.position)
            position.append(other is not None)
            colour.append(other is not None and other.colour == thing.colour)
            shape.append(other is not None and other.shape == thing.shape)
        exact.append(seen == frozenset(scene))
    return Accuracy(*(float(np.mean(share)) for share in (position, colour, shape, exact)))


def adherence(prompt: str, image: Floats) -> float:
    """How far a image float32 [3, 32, 32] in [-1, 1] obeys its prompt: 0 to 1.

    Objects that are both in the prompt and recognised, with colour, shape and position, as a share of those
    that are either.
    `sws-export evaluate` calls it.
    """
    wanted, seen = frozenset(prompts.parse(prompt)), recognise(image)
    return len(wanted & seen) / len(wanted | seen) if wanted | seen else 1.0


def random_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes for a check: the same for the same seed, about 60 % with one object and the others with two."""
    rng = np.random.default_rng((seed, 0xC4EC))
    return [scenes.random_scene(rng) for _ in range(count)]


@cache
def _renderings(position: str) -> tuple[list[SceneObject | None], Floats]:
    """Every object that can stand at a position, and none, each beside its cell as one row of floats.

    Objects appear at nine offsets within the jitter of training, so that a shifted circle is not recognised
    as a square.
    """
    x, y = scenes.POSITIONS[position]
    shifts = (-scenes.JITTER, 0.0, scenes.JITTER)
    candidates: list[SceneObject | None] = [None]
    renderings = [np.zeros_like(_cell(scenes.render(()), position)).ravel()]
    for shape in scenes.SHAPES:
        covers = [scenes.coverage(shape, x + dx, y + dy, scenes.RADIUS) for dx in shifts for dy in shifts]
        for colour, rgb in scenes.COLOURS.items():
            ink = np.array(rgb, dtype=np.float32)[:, None, None]
            candidates += [SceneObject(colour, shape, position)] * len(covers)
            renderings += [_cell(cover * ink, position).ravel() for cover in covers]
    return candidates, np.stack(renderings)


def _cell(image: Floats, position: str) -> Floats:
    x, y = (int(centre) for centre in scenes.POSITIONS[position])
    return image[:, max(0, y - _HALF_CELL) : y + _HALF_CELL, max(0, x - _HALF_CELL) : x + _HALF_CELL]


def load_artefact(path: Path) -> Any:
    """An exported graph that is called as the torch UNet is, with SWS at its recommended strength."""
    from diffusers import EulerDiscreteScheduler

    from examples.shapes.sample import HERE
    from sws_export.adapters.diffusers import SWSUNet

    scheduler = EulerDiscreteScheduler.from_pretrained(HERE, subfolder="scheduler")
    return SWSUNet.load(path, scheduler=scheduler)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image", type=Path, help="also write the samples to this PNG")
    parser.add_argument("--artefact", type=Path, help="an exported graph in place of the torch UNet")
    arguments = parser.parse_args()

    from examples.shapes import entropy
    from examples.shapes.sample import load_unet, sample, to_grid

    unet = load_artefact(arguments.artefact) if arguments.artefact else load_unet()
    wanted = random_scenes(arguments.prompts, arguments.seed)
    texts = [prompts.describe(scene) for scene in wanted]
    images = sample(unet, texts, arguments.steps, arguments.guidance, arguments.seed)
    if arguments.image:
        to_grid(images).save(arguments.image)
    report: dict[str, object] = {"accuracy": accuracy(wanted, images)._asdict()}
    if not arguments.artefact:
        report["entropy"] = {
            "trained": entropy.self_attention_entropy(unet),
            "random": entropy.self_attention_entropy(entropy.with_random_weights(unet)),
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

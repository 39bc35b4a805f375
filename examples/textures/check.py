"""Do samples obey their prompts: `nice python -m examples.textures.check`.

Draws samples of random prompts, recognises what is on them, and prints the shares that are right.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

# Relative, so that `sws-export evaluate` imports it from wherever the folder lies.
from . import prompts, scenes
from .scenes import Scene, SceneObject

Floats = npt.NDArray[np.floating]

HALF = scenes.SIZE // 2
# Coloured is a pixel whose largest and smallest channel differ by this share of the range.
COLOURED = 0.22
# An object has at least this overlap (intersection over union) with the best of all placed shapes.
OVERLAP = 0.7
# Standard deviation of the place between the deep and the light tone: below, an object is plain.
PLAIN = 0.16
# A texture has at least this correlation with the best of all placed patterns of its kind.
CORRELATION = 0.6
# Squared Mahalanobis distance, as a multiple of the number of features, beyond which a background is none.
FAR = 12.0


class Accuracy(NamedTuple):
    """Shares in [0, 1] of the objects and backgrounds in the prompts, all words, and whole images."""

    position: float  # there is an object at the position of the prompt
    colour: float  # ... and has its colour
    texture: float  # ... and its texture
    shape: float  # ... and its shape
    background: float
    words: float  # all of the above: words of the prompt that are obeyed
    exact: float  # every object and the background are right, no object is missing and none is too many


def recognise(image: Floats) -> Scene:
    """What is on a image [3, 64, 64] in [-1, 1]; words that nothing fits are `unknown`."""
    objects, free = [], np.ones((scenes.SIZE, scenes.SIZE), bool)
    for position, (x, y) in scenes.POSITIONS.items():
        cell = (slice(int(y) - HALF // 2, int(y) + HALF // 2), slice(int(x) - HALF // 2, int(x) + HALF // 2))
        found = _recognise_object(np.asarray(image[:, *cell] / 2 + 0.5, np.float32))
        if found is not None:
            colour, texture, shape, covered = found
            objects.append(SceneObject(colour, texture, shape, position))
            free[cell] &= ~covered
    return Scene(tuple(objects), _recognise_background(image, free))


def accuracy(wanted: Sequence[Scene], images: Floats) -> Accuracy:
    """How far images [N, 3, 64, 64] in [-1, 1] show the N scenes of their prompts."""
    objects, backgrounds, exact = [], [], []
    for scene, image in zip(wanted, images, strict=True):
        seen = recognise(image)
        there = {thing.position: thing for thing in seen.objects}
        for thing in scene.objects:
            other = there.get(thing.position)
            parts = ("colour", "texture", "shape") if other else ()
            same = [getattr(other, part) == getattr(thing, part) for part in parts] or [False] * 3
            objects.append([other is not None, *same])
        right = seen.background == scene.background
        backgrounds += [right] if scene.background else []
        exact.append(set(seen.objects) == set(scene.objects) and (right or scene.background is None))
    named = np.mean(backgrounds) if backgrounds else math.nan
    words = np.mean([*itertools.chain(*objects), *backgrounds])
    return Accuracy(*np.mean(objects, axis=0).tolist(), float(named), float(words), float(np.mean(exact)))


def adherence(prompt: str, image: Floats) -> float:
    """How far a image [3, 64, 64] in [-1, 1] obeys its prompt: 0 to 1.

    Objects (and the background, if the prompt names it) that are asked for and seen, with all their words, as
    a share of those that are either. `sws-export evaluate` calls it.
    """
    asked, found = prompts.parse(prompt), recognise(image)
    wanted, seen = set[object](asked.objects), set[object](found.objects)
    if asked.background:
        wanted.add(asked.background)
        seen.add(found.background)
    return len(wanted & seen) / len(wanted | seen) if wanted | seen else 1.0


def random_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes for a check: the same for the same seed."""
    rng = np.random.default_rng((seed, 0xC4EC))
    return [scenes.random_scene(rng) for _ in range(count)]


def rates_by_kind(wanted: Sequence[Scene], images: Floats) -> dict[str, dict[str, float]]:
    """`accuracy` over all images, and for each number of objects and each background that is named."""
    kinds = {"all": list(range(len(wanted)))}
    for number, scene in enumerate(wanted):
        for kind in (f"{len(scene.objects)} object(s)", f"on {scene.background or 'any'}"):
            kinds.setdefault(kind, []).append(number)
    rates = {}
    for kind, numbers in sorted(kinds.items()):
        share = accuracy([wanted[number] for number in numbers], images[numbers])
        rates[kind] = {
            name: round(value, 3) for name, value in share._asdict().items() if not math.isnan(value)
        }
    return rates


def _recognise_object(cell: Floats) -> tuple[str, str, str, npt.NDArray[np.bool_]] | None:
    """Colour, texture, shape and covered pixels of what stands in a cell [3, 32, 32] in [0, 1], or None."""
    hues = _plane(np.array(list(scenes.COLOURS.values()), np.float32).T)
    hue = np.einsum("pc,pyx->cyx", hues / np.linalg.norm(hues, axis=0), _plane(cell)).argmax(axis=0)
    coloured = np.ptp(cell, axis=0) > COLOURED
    votes = np.bincount(hue[coloured], minlength=len(scenes.COLOURS))
    mask = coloured & (hue == votes.argmax())
    shapes, covers = _covers()
    both = covers @ mask.ravel().astype(np.float32)
    overlap = both / (covers.sum(axis=1) + mask.sum() - both)
    best = int(overlap.argmax())
    if overlap[best] < OVERLAP:
        return None
    covered = covers[best].reshape(mask.shape) > 0
    colour = list(scenes.COLOURS)[int(votes.argmax())]
    inside = ~_grown(~covered, 1) & mask
    return colour, _recognise_texture(cell, colour, inside), shapes[best], _grown(covered)


def _recognise_texture(cell: Floats, colour: str, mask: npt.NDArray[np.bool_]) -> str:
    deep, light = (tone.numpy() for tone in scenes.tones(torch.tensor(scenes.COLOURS[colour])))
    span = light - deep
    place = np.einsum("c,cn->n", span, cell[:, mask] - deep[:, None]) / np.square(span).sum()
    place = place.clip(-0.5, 1.5)
    if place.std() < PLAIN:
        return "plain"
    names, patterns = _patterns()
    here = patterns[:, mask.ravel()]
    here = here - here.mean(axis=1, keepdims=True)
    place = place - place.mean()
    correlation = here @ place / (np.linalg.norm(here, axis=1) * np.linalg.norm(place))
    best = int(correlation.argmax())
    return names[best] if correlation[best] >= CORRELATION else "unknown"


def _recognise_background(image: Floats, free: npt.NDArray[np.bool_]) -> str:
    """The background whose features are nearest to those of the pixels that `free` marks."""
    means, inverse = _backgrounds()
    away = means - _features(image, free)
    distances = np.einsum("bf,fg,bg->b", away, inverse, away)
    nearest = int(distances.argmin())
    return scenes.BACKGROUNDS[nearest] if distances[nearest] < FAR * len(inverse) else "unknown"


def _features(image: Floats, free: npt.NDArray[np.bool_]) -> Floats:
    """Logarithms of mean absolute differences of brightness at lags along x and y, and mean chroma."""
    grey = image.mean(axis=0)
    features = []
    for lag, axis in itertools.product((1, 3, 6), (0, 1)):
        first, second = slice(None, -lag), slice(lag, None)
        ends = (first, second) if axis == 0 else ((slice(None), first), (slice(None), second))
        both = free[ends[0]] & free[ends[1]]
        features.append(np.log(0.02 + np.abs(grey[ends[1]] - grey[ends[0]])[both].mean()))
    chroma = np.abs(image[0] - image[2])[free].mean()
    return np.array([*features, np.log(0.02 + chroma)])


def _plane(rgb: Floats) -> Floats:
    """Two opponent colours of RGB: the plane in which the angle is the hue."""
    return np.stack([rgb[0] - (rgb[1] + rgb[2]) / 2, (rgb[1] - rgb[2]) * math.sqrt(0.75)])


def _grown(mask: npt.NDArray[np.bool_], times: int = 2) -> npt.NDArray[np.bool_]:
    """A mask and all pixels within `times` steps along the axes."""
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = mask | padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]
    return mask


def _offsets() -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.arange(HALF) + 0.5 - HALF / 2
    return centres[None, :], centres[:, None]


@cache
def _covers() -> tuple[list[str], npt.NDArray[np.float32]]:
    """Every shape at offsets and sizes within the jitter: names, and rows of 0 and 1 for a cell."""
    u, v = _offsets()
    shifts = np.linspace(-1.25 * scenes.JITTER, 1.25 * scenes.JITTER, 5)
    radii = np.linspace(scenes.RADIUS - scenes.RADIUS_JITTER, scenes.RADIUS + scenes.RADIUS_JITTER, 5)
    placed = list(itertools.product(scenes.SHAPES, shifts, shifts, radii))
    covers = [scenes.coverage(shape, u - dx, v - dy, radius) > 0.5 for shape, dx, dy, radius in placed]
    return [shape for shape, *_ in placed], torch.stack(covers).flatten(1).numpy().astype(np.float32)


@cache
def _patterns() -> tuple[list[str], npt.NDArray[np.float32]]:
    """Every texture at all phases, periods and angles: names, and rows of shares of the light tone."""
    names: list[str] = []
    rows = []
    u, v = (offset[None] for offset in _offsets())
    for texture in scenes.TEXTURES[1:]:
        striped = texture == "striped"
        phases = np.arange(0, 1, 1 / 8)
        grid = itertools.product(
            np.linspace(-scenes.TILT, scenes.TILT, 5),
            (-1, 1) if striped else (1,),
            (0.94, 1.0, 1.06),
            phases,
            (0,) if striped else phases,
        )
        tilt, sign, size, first, second = torch.tensor(list(grid), dtype=torch.float32).T[:, :, None, None]
        rows.append(scenes.pattern(texture, u, v, tilt, sign, size, (first, second)).flatten(1).numpy())
        names += [texture] * len(rows[-1])
    return names, np.concatenate(rows)


@cache
def _backgrounds() -> tuple[Floats, Floats]:
    """Mean features of each background and the inverse of their common covariance (64 renderings each)."""
    everywhere = np.ones((scenes.SIZE, scenes.SIZE), bool)
    features = []
    for background in scenes.BACKGROUNDS:
        images = scenes.render([Scene((), background)] * 64, np.random.default_rng(1)).numpy()
        features.append([_features(image, everywhere) for image in images])
    means = np.mean(features, axis=1)
    spread = (np.array(features) - means[:, None]).reshape(-1, means.shape[1])
    # Samples differ from renderings by a little noise and blur: no direction is sharper than this.
    covariance = spread.T @ spread / len(spread) + 0.05 * np.eye(len(means[0]))
    return means, np.linalg.inv(covariance)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="another trained pipeline than that of this folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--image", type=Path, help="also write the samples to this PNG")
    arguments = parser.parse_args()

    from examples.shapes.sample import to_grid
    from examples.textures.sample import HERE, load, sample

    pipe = load(arguments.folder or HERE, arguments.device)
    wanted = random_scenes(arguments.prompts, arguments.seed)
    texts = [prompts.describe(scene) for scene in wanted]
    images = sample(pipe, texts, arguments.steps, arguments.guidance, arguments.seed)
    if arguments.image:
        to_grid(images, scale=2).save(arguments.image)
    print(json.dumps(rates_by_kind(wanted, images), indent=2))


if __name__ == "__main__":
    main()

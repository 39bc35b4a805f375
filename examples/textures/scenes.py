"""Procedurally drawn scenes, 64 x 64 pixels: textured shapes on a textured background, in batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

Uniform = Callable[[float, float], torch.Tensor]

SIZE = 64
RADIUS = 11.5
RADIUS_JITTER = 1.2
JITTER = 1.5

# RGB in [0, 1]. Hues are far apart, and backgrounds have nearly none: `check` identifies objects by hue.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "yellow": (0.95, 0.85, 0.10),
    "green": (0.10, 0.75, 0.15),
    "cyan": (0.10, 0.78, 0.88),
    "blue": (0.15, 0.25, 0.95),
    "purple": (0.72, 0.12, 0.85),
}
TEXTURES: tuple[str, ...] = ("plain", "striped", "checked", "dotted")
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
# Centres (x, y) in pixels, y downwards.
POSITIONS: dict[str, tuple[float, float]] = {
    "top-left": (16.0, 16.0),
    "top-right": (48.0, 16.0),
    "bottom-left": (16.0, 48.0),
    "bottom-right": (48.0, 48.0),
}
BACKGROUNDS: tuple[str, ...] = ("wood", "cloth", "gradient", "clutter")
# A texture alternates between two tones of the colour: its product with DEEP, and a mix with white.
DEEP, LIGHT = 0.75, 0.55
# Textures vary little about the middle of their object: turned by radians, moved by shares of a period.
TILT, SHIFT = 0.12, 0.15
# Most and least things of clutter.
CLUTTER = (12, 6)


class SceneObject(NamedTuple):
    colour: str
    texture: str
    shape: str
    position: str


class Scene(NamedTuple):
    """Up to two objects at different positions; `background` None: any."""

    objects: tuple[SceneObject, ...]
    background: str | None


def random_scene(rng: np.random.Generator) -> Scene:
    """One object or two, all words equally likely; no background is named one time in four."""
    places = rng.permutation(len(POSITIONS))[: rng.integers(1, 3)]
    kinds = [[*COLOURS], TEXTURES, SHAPES]
    objects = tuple(
        SceneObject(*(words[rng.integers(len(words))] for words in kinds), [*POSITIONS][place])
        for place in places
    )
    return Scene(objects, BACKGROUNDS[rng.integers(4)] if rng.random() < 0.75 else None)


def render(
    scenes: Sequence[Scene], rng: np.random.Generator, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Images of scenes: float32 [N, 3, SIZE, SIZE] in [-1, 1] on `device`.

    Place, size, and angle, period and phase of textures are drawn from `rng`, equal on all devices.
    """
    count = len(scenes)

    def moved(numbers: object) -> torch.Tensor:
        return torch.as_tensor(numbers, dtype=torch.float32).to(device, non_blocking=True)

    draws = iter(moved(rng.random((160, count, 1, 1), dtype=np.float32)))
    noise = moved(rng.standard_normal((count, 3, SIZE, 5), dtype=np.float32))

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * next(draws)

    centres = moved(np.arange(SIZE) + 0.5)
    x, y = centres[None, None, :], centres[None, :, None]
    grounds = [ground(x, y, uniform, noise) for ground in (_wood, _cloth, _gradient, _clutter)]
    chosen = [rng.integers(4) if s.background is None else BACKGROUNDS.index(s.background) for s in scenes]
    index = moved(chosen).long()
    everywhere = torch.arange(count, device=device)
    image = torch.stack([ground.expand(count, 3, SIZE, SIZE) for ground in grounds])[index, everywhere]
    for slot in range(2):
        things = [s.objects[slot] if slot < len(s.objects) else None for s in scenes]
        numbers = [
            (*POSITIONS[t.position], SHAPES.index(t.shape), TEXTURES.index(t.texture), *COLOURS[t.colour], 1)
            if t
            else (0,) * 8
            for t in things
        ]
        left, top, shape, texture, red, green, blue, present = moved(numbers).T[:, :, None, None]
        u = x - left - uniform(-JITTER, JITTER)
        v = y - top - uniform(-JITTER, JITTER)
        radius = RADIUS + uniform(-RADIUS_JITTER, RADIUS_JITTER)
        covers = torch.stack([coverage(name, u, v, radius) for name in SHAPES])
        cover = covers[shape[:, 0, 0].long(), everywhere] * present
        tilt, sign = uniform(-TILT, TILT), uniform(-1, 1).sign()
        size, phases = uniform(0.95, 1.05), (uniform(-SHIFT, SHIFT), uniform(-SHIFT, SHIFT))
        patterns = [pattern(name, u, v, tilt, sign, size, phases) for name in TEXTURES[1:]]
        shares = torch.stack([torch.zeros_like(cover), *patterns])
        share = shares[texture[:, 0, 0].long(), everywhere][:, None]
        colour = torch.stack([red, green, blue], dim=1)
        deep, light = tones(colour)
        ink = torch.where(texture[:, None] == 0, colour, deep + (light - deep) * share)
        image = image + cover[:, None] * (ink - image)
    return 2 * image - 1


def tones(colour: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The deep and the light tone of a colour, RGB in [0, 1]."""
    return DEEP * colour, colour + LIGHT * (1 - colour)


def coverage(shape: str, u: torch.Tensor, v: torch.Tensor, radius: torch.Tensor | float) -> torch.Tensor:
    """Share of each pixel at (u, v) from the centre that a shape covers, from the distance to its edge."""
    if shape == "circle":
        distance = torch.hypot(u, v) - radius
    elif shape == "square":
        distance = torch.maximum(u.abs(), v.abs()) - 0.85 * radius
    elif shape == "triangle":
        # Two sides of slope 2 that meet at (0, -radius) and a base.
        distance = torch.maximum((2 * u.abs() - (v + radius)) / math.sqrt(5), v - 0.9 * radius)
    else:
        long, wide = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
        distance = torch.maximum(long - radius, wide - 0.38 * radius)
    return (0.5 - distance).clamp(0, 1)


def pattern(
    texture: str,
    u: torch.Tensor,
    v: torch.Tensor,
    tilt: torch.Tensor,
    sign: torch.Tensor,
    size: torch.Tensor,
    phases: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Share of the light tone at (u, v): anti-aliased stripes, checks or dots.

    `tilt` is in radians, from a diagonal (`sign`: which one) for stripes and from the axes for the others;
    `size` is a factor on the period and `phases` are in periods.
    """
    angle = tilt + sign * math.pi / 4 if texture == "striped" else tilt
    a = u * angle.cos() + v * angle.sin()
    b = v * angle.cos() - u * angle.sin()
    period = {"striped": 6.2, "checked": 8.8, "dotted": 6.2}[texture] * size
    a, b = a / period + phases[0], b / period + phases[1]
    if texture == "striped":
        edge = (2 * math.pi * a).sin() * period / (2 * math.pi)
    elif texture == "checked":
        edge = (2 * math.pi * a).sin() * (2 * math.pi * b).sin() * period / (2 * math.pi)
    else:
        edge = (0.31 - torch.hypot(a - a.round(), b - b.round())) * period
    return (0.5 + edge).clamp(0, 1)


def _between(share: torch.Tensor, dark: Sequence[float], light: Sequence[float]) -> torch.Tensor:
    """RGB [N, 3, SIZE, SIZE] between two colours by shares [N, SIZE, SIZE]."""
    share = share.clamp(0, 1)
    return torch.stack([low + (high - low) * share for low, high in zip(dark, light, strict=True)], dim=1)


def _wood(x: torch.Tensor, y: torch.Tensor, uniform: Uniform, noise: torch.Tensor) -> torch.Tensor:
    """Bent rings along x and fine streaks."""
    bent = y + 3 * (2 * math.pi * (x / SIZE * uniform(0.5, 1.2) + uniform(0, 1))).sin()
    slow = (2 * math.pi * (bent / uniform(20, 35) + uniform(0, 1))).sin()
    rings = (2 * math.pi * bent / uniform(7, 10) + 2 * slow).sin()
    streaks = torch.nn.functional.interpolate(noise[:, :1], size=(SIZE, SIZE), mode="bilinear")[:, 0]
    return _between(0.5 + 0.3 * rings + 0.13 * streaks, (0.40, 0.33, 0.27), (0.72, 0.64, 0.56))


def _cloth(x: torch.Tensor, y: torch.Tensor, uniform: Uniform, noise: torch.Tensor) -> torch.Tensor:
    """A plain weave: threads of 3 pixels that pass over and under each other, each of its own brightness."""
    u, v = (x + uniform(0, 6)) / 3, (y + uniform(0, 6)) / 3
    over = (u.floor() + v.floor()) % 2
    threads = over * ((math.pi * u).sin().abs() + 0.25 * noise[:, 1, None, :, 0])
    threads = threads + (1 - over) * ((math.pi * v).sin().abs() - 0.3 + 0.25 * noise[:, 2, :, 0, None])
    return _between(0.1 + 0.8 * threads, (0.33, 0.36, 0.41), (0.70, 0.73, 0.78))


def _gradient(x: torch.Tensor, y: torch.Tensor, uniform: Uniform, noise: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """A smooth ramp in any direction."""
    angle = uniform(-math.pi, math.pi)
    ramp = ((x - SIZE / 2) * angle.cos() + (y - SIZE / 2) * angle.sin()) / SIZE
    return _between(0.5 + uniform(0.6, 1.0) * ramp, (0.20, 0.20, 0.23), (0.86, 0.86, 0.89))


def _clutter(x: torch.Tensor, y: torch.Tensor, uniform: Uniform, noise: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """Dark and light grey discs and bars of several sizes on grey, over each other."""
    most, least = CLUTTER
    shade = 0.5 + 0 * (x + y) * uniform(0, 1)
    count = uniform(least, most)
    for number in range(most):
        u, v = x - uniform(0, SIZE), y - uniform(0, SIZE)
        if number % 2:
            distance = torch.hypot(u, v) - uniform(3, 6)
        else:
            angle = uniform(0, math.pi)
            along, across = u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin()
            distance = torch.maximum(along.abs() - uniform(5, 10), across.abs() - uniform(1.5, 3))
        cover = (0.5 - distance).clamp(0, 1) * (number < count)
        shade = shade + cover * (0.5 + uniform(0.25, 0.4) * uniform(-1, 1).sign() - shade)
    return _between(shade, (0, 0, 0), (1, 1, 1))

"""Procedurally drawn scenes: one or two coloured shapes on grey, 32 x 32 pixels, anti-aliased, numpy only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

SIZE = 32
RADIUS = 4.8
JITTER = 0.7
RADIUS_JITTER = 0.4

# RGB in [-1, 1]; the background is mid-grey, 0.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.9, -0.8, -0.8),
    "green": (-0.8, 0.7, -0.8),
    "blue": (-0.8, -0.6, 0.9),
    "yellow": (0.9, 0.8, -0.8),
    "white": (0.95, 0.95, 0.95),
    "black": (-0.95, -0.95, -0.95),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
# Centres (x, y) in pixels, y downwards.
POSITIONS: dict[str, tuple[float, float]] = {
    "top-left": (6.0, 6.0),
    "top": (16.0, 6.0),
    "top-right": (26.0, 6.0),
    "left": (6.0, 16.0),
    "center": (16.0, 16.0),
    "right": (26.0, 16.0),
    "bottom-left": (6.0, 26.0),
    "bottom": (16.0, 26.0),
    "bottom-right": (26.0, 26.0),
}


class SceneObject(NamedTuple):
    colour: str
    shape: str
    position: str


Scene = tuple[SceneObject, ...]


def render(scene: Scene, rng: np.random.Generator | None = None) -> npt.NDArray[np.float32]:
    """Image of a scene: float32 [3, SIZE, SIZE] in [-1, 1].

    Without `rng` every object sits exactly at its position with radius RADIUS; with it, place and radius vary
    by up to JITTER and RADIUS_JITTER pixels. Later objects are drawn over earlier ones.
    """
    image = np.zeros((3, SIZE, SIZE), dtype=np.float32)
    for thing in scene:
        dx, dy, dr = (0.0, 0.0, 0.0) if rng is None else rng.uniform(-1.0, 1.0, 3)
        x, y = POSITIONS[thing.position]
        cover = coverage(thing.shape, x + JITTER * dx, y + JITTER * dy, RADIUS + RADIUS_JITTER * dr)
        colour = np.array(COLOURS[thing.colour], dtype=np.float32)[:, None, None]
        image += cover * (colour - image)
    return image


def coverage(shape: str, x: float, y: float, radius: float) -> npt.NDArray[np.float32]:
    """Share of each pixel that a shape covers: float32 [SIZE, SIZE], from the signed distance to its edge."""
    centres: Floats = np.arange(SIZE, dtype=np.float64) + 0.5
    u, v = centres[None, :] - x, centres[:, None] - y
    share: npt.NDArray[np.float32] = np.clip(0.5 - _signed_distance(shape, u, v, radius), 0.0, 1.0).astype(
        np.float32
    )
    return share


def random_scene(rng: np.random.Generator) -> Scene:
    """One object (probability 0.6) or two at different positions, all words equally likely."""
    count = 1 if rng.random() < 0.6 else 2
    places = rng.choice(len(POSITIONS), size=count, replace=False)
    colours, positions = tuple(COLOURS), tuple(POSITIONS)
    return tuple(
        SceneObject(colours[rng.integers(len(colours))], SHAPES[rng.integers(len(SHAPES))], positions[place])
        for place in places
    )


def _signed_distance(shape: str, u: Floats, v: Floats, radius: float) -> Floats:
    """Distance to the edge in pixels, negative inside (exact near edges: all that coverage needs)."""
    distance: Floats
    if shape == "circle":
        distance = np.hypot(u, v) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(u), np.abs(v)) - 0.85 * radius
    elif shape == "triangle":
        # Two sides of slope 2 that meet at (0, -radius) and a base at v = +radius.
        sides = (2.0 * np.abs(u) - (v + radius)) / np.sqrt(5.0)
        distance = np.maximum(sides, v - 0.9 * radius)
    elif shape == "cross":
        arm = 0.32 * radius
        upright = np.maximum(np.abs(u) - arm, np.abs(v) - radius)
        level = np.maximum(np.abs(u) - radius, np.abs(v) - arm)
        distance = np.minimum(upright, level)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return distance

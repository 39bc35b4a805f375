"""Prompts of the shapes model: a tiny grammar and a fixed word embedding in place of a text encoder.

    prompt := "" | phrase | phrase "and" phrase        phrase := COLOUR SHAPE POSITION

Nothing here is learned: every word has one seeded random vector, so a prompt always gives the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from .scenes import COLOURS, POSITIONS, SHAPES, Scene, SceneObject

TOKENS = 8
WIDTH = 64
START, PAD, AND = "<start>", "<pad>", "and"
VOCABULARY: tuple[str, ...] = (START, PAD, AND, *COLOURS, *SHAPES, *POSITIONS)

_SEED = 20240607
_ORDER_SCALE = 0.3


class PromptError(ValueError):
    """The prompt is outside the grammar; the message has the word and what was expected there."""


def parse(prompt: str) -> Scene:
    """The objects of a prompt, in its order; `()` for the empty prompt.

    Raises PromptError on an unknown word, a word in the wrong place or two objects at one position.
    """
    words = prompt.lower().replace(",", " ").split()
    for word in words:
        if word not in VOCABULARY[2:]:
            known = ", ".join(VOCABULARY[2:])
            raise PromptError(f"prompt {prompt!r}: unknown word {word!r}; known words: {known}")
    if not words:
        return ()
    phrases = [phrase.split() for phrase in re.split(rf"\b{AND}\b", " ".join(words))]
    if len(phrases) > 2:
        raise PromptError(f"prompt {prompt!r}: {len(phrases)} objects; ask for at most 2, joined by {AND!r}")
    scene = tuple(_parse_phrase(prompt, phrase) for phrase in phrases)
    if len({thing.position for thing in scene}) < len(scene):
        raise PromptError(f"prompt {prompt!r}: two objects at {scene[0].position!r}; give them two positions")
    return scene


def describe(scene: Scene) -> str:
    """The prompt of a scene; `parse(describe(scene)) == scene`."""
    return f" {AND} ".join(f"{thing.colour} {thing.shape} {thing.position}" for thing in scene)


def embed(prompt: str) -> npt.NDArray[np.float32]:
    """encoder_hidden_states of one prompt: float32 [TOKENS, WIDTH].

    Token = word vector + sum of the word vectors of its phrase (so that each token identifies its object,
    as in the output of a real text encoder) + a sinusoidal code of its place.
    Variance is about 1. Raises PromptError as `parse` does.
    """
    vectors = _word_vectors()
    tokens = np.tile(vectors[PAD], (TOKENS, 1))
    tokens[0] = vectors[START]
    place = 1
    for number, thing in enumerate(parse(prompt)):
        if number > 0:
            tokens[place] = vectors[AND]
            place += 1
        phrase = np.stack([vectors[thing.colour], vectors[thing.shape], vectors[thing.position]])
        tokens[place : place + 3] = (phrase + phrase.sum(axis=0)) / np.sqrt(6.0)
        place += 3
    return (tokens + _ORDER_SCALE * _order_code()).astype(np.float32)


def embed_all(prompts: Sequence[str]) -> npt.NDArray[np.float32]:
    """encoder_hidden_states of a batch: float32 [len(prompts), TOKENS, WIDTH]."""
    return np.stack([embed(prompt) for prompt in prompts])


def _parse_phrase(prompt: str, words: list[str]) -> SceneObject:
    expected: tuple[tuple[str, Iterable[str]], ...] = (
        ("colour", COLOURS),
        ("shape", SHAPES),
        ("position", POSITIONS),
    )
    if len(words) != len(expected):
        found = " ".join(words) or "nothing"
        raise PromptError(f"prompt {prompt!r}: expected 'COLOUR SHAPE POSITION', found {found!r}")
    for word, (kind, known) in zip(words, expected, strict=True):
        if word not in tuple(known):
            expected_here = f"a {kind} is expected ({', '.join(known)})"
            raise PromptError(f"prompt {prompt!r}: found {word!r} where {expected_here}")
    return SceneObject(*words)


@cache
def _word_vectors() -> dict[str, npt.NDArray[np.float64]]:
    # One seeded draw for the whole vocabulary: adding a word at its end leaves the others as they are.
    draws = np.random.Generator(np.random.PCG64(_SEED)).standard_normal((len(VOCABULARY), WIDTH))
    return dict(zip(VOCABULARY, draws, strict=True))


@cache
def _order_code() -> npt.NDArray[np.float64]:
    # Sinusoids as in "Attention Is All You Need", section 3.5, base 100 instead of 10000 for 8 places.
    rates = 100.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    angles = np.arange(TOKENS)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

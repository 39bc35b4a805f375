"""Prompts of the textures model: a tiny grammar and a fixed word embedding in place of a text encoder.

    prompt := "" | phrase ["and" phrase] ["on" BACKGROUND]        phrase := COLOUR TEXTURE SHAPE POSITION

Nothing here is learned: every word has one seeded random vector, so a prompt always gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from .scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, TEXTURES, Scene, SceneObject

TOKENS = 12
WIDTH = 64
START, PAD, AND, ON = "<start>", "<pad>", "and", "on"
KINDS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "shape": SHAPES,
    "position": tuple(POSITIONS),
}
VOCABULARY: tuple[str, ...] = (START, PAD, AND, ON, *sum(KINDS.values(), ()), *BACKGROUNDS)

_SEED = 20261126
_ORDER_SCALE = 0.3


class PromptError(ValueError):
    """The prompt is outside the grammar; the message has the word and what was expected there."""


def parse(prompt: str) -> Scene:
    """The scene of a prompt; that of the empty prompt has nothing.

    Raises PromptError on an unknown word, a word in the wrong place or two objects at one position.
    """
    words = prompt.lower().replace(",", " ").split()
    for word in words:
        if word not in VOCABULARY[2:]:
            known = ", ".join(VOCABULARY[2:])
            raise PromptError(f"prompt {prompt!r}: unknown word {word!r}; known words: {known}")
    if not words:
        return Scene((), None)
    described, on, background = f"{' '.join(words)} ".partition(f" {ON} ")
    if on and background.strip() not in BACKGROUNDS:
        found, known = background.strip() or "nothing", ", ".join(BACKGROUNDS)
        raise PromptError(f"prompt {prompt!r}: found {found!r} where a background is expected ({known})")
    phrases = described.split(f" {AND} ")
    if len(phrases) > 2:
        raise PromptError(f"prompt {prompt!r}: {len(phrases)} objects; ask for at most 2, joined by {AND!r}")
    objects = tuple(_parse_phrase(prompt, phrase.split()) for phrase in phrases)
    if len({thing.position for thing in objects}) < len(objects):
        raise PromptError(
            f"prompt {prompt!r}: two objects at {objects[0].position!r}; expected two positions"
        )
    return Scene(objects, background.strip() or None)


def describe(scene: Scene) -> str:
    """The prompt of a scene; `parse(describe(scene)) == scene`."""
    objects = f" {AND} ".join(" ".join(thing) for thing in scene.objects)
    return f"{objects} {ON} {scene.background}" if scene.background else objects


def embed(scene: Scene) -> npt.NDArray[np.float32]:
    """encoder_hidden_states of one scene: float32 [TOKENS, WIDTH], variance about 1.

    Token = word vector + sum of the word vectors of its phrase, the position counted three times (so that
    each token identifies its object, as in the output of a real text encoder) + a sinusoidal
    code of its place.
    """
    vectors = _word_vectors()
    tokens = [vectors[START][None]]
    for number, thing in enumerate(scene.objects):
        phrase = np.stack([vectors[word] for word in thing])
        about = phrase.sum(axis=0) + 2 * vectors[thing.position]
        tokens += [vectors[AND][None]] * (number > 0) + [(phrase + about) / 15**0.5]
    if scene.background:
        tokens += [vectors[ON][None], vectors[scene.background][None]]
    embedded = np.concatenate(tokens)
    padding = np.tile(vectors[PAD], (TOKENS - len(embedded), 1))
    return np.concatenate([embedded, padding]) + _order_code()


def embed_all(prompts: Sequence[str]) -> npt.NDArray[np.float32]:
    """encoder_hidden_states float32 [len(prompts), TOKENS, WIDTH]. Raises PromptError as `parse` does."""
    return np.stack([embed(parse(prompt)) for prompt in prompts])


def _parse_phrase(prompt: str, words: list[str]) -> SceneObject:
    if len(words) != len(KINDS):
        expected, found = " ".join(KINDS).upper(), " ".join(words) or "nothing"
        raise PromptError(f"prompt {prompt!r}: expected {expected!r}, found {found!r}")
    for word, (kind, known) in zip(words, KINDS.items(), strict=True):
        if word not in known:
            raise PromptError(
                f"prompt {prompt!r}: found {word!r} where a {kind} is expected ({', '.join(known)})"
            )
    return SceneObject(*words)


@cache
def _word_vectors() -> dict[str, npt.NDArray[np.float32]]:
    draws = np.random.Generator(np.random.PCG64(_SEED)).standard_normal((len(VOCABULARY), WIDTH))
    return dict(zip(VOCABULARY, draws.astype(np.float32), strict=True))


@cache
def _order_code() -> npt.NDArray[np.float32]:
    # Sinusoids as in "Attention Is All You Need", section 3.5, base 100 instead of 10000 for few places.
    angles = np.arange(TOKENS)[:, None] * 100.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    code = _ORDER_SCALE * np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return code.astype(np.float32)

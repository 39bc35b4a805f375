"""GPU memory that an engine needs, as TensorRT's builder reports it; no GPU is used to measure it."""

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sws_export.byte_sizes import format_bytes
from sws_export.tensors import ProfileShapes

_FIGURE = re.compile(
    r"Constructing optimization profile number (?P<profile>\d+)"
    r"|Total Activation Memory: (?P<activations>\d+) bytes"
    r"|Total Device Persistent Memory: (?P<persistent>\d+) bytes"
    r"|Max Scratch Memory: (?P<scratch>\d+) bytes"
    r"|Total Weights Memory: (?P<weights>\d+) bytes"
)
STATE_BUFFERS = 2
"""A step reads a state from one buffer and writes the next state to the other one."""
_FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class ProfileMemory:
    """Device memory of one execution context with one optimization profile, in bytes.

    Attributes:
        activations: Tensors between layers, scratch memory, and what the context keeps from step to step.
        scratch: Largest scratch memory of one layer, contained in `activations`.
        states: Two buffers for each state, at the largest shapes of the profile.
    """

    activations: int
    scratch: int
    states: int = 0


@dataclasses.dataclass(frozen=True)
class GpuMemory:
    """Device memory of an engine in bytes. Inputs, outputs and the CUDA context are not counted.

    Attributes:
        weights: Shared by all execution contexts.
        profiles: One entry per optimization profile.
    """

    weights: int
    profiles: tuple[ProfileMemory, ...]

    def total(self, profile: int) -> int:
        """Bytes for one execution context with this profile."""
        of_profile = self.profiles[profile]
        return self.weights + of_profile.activations + of_profile.states

    @property
    def largest(self) -> int:
        """Index of the profile that needs the most memory."""
        return max(range(len(self.profiles)), key=self.total)

    def describe(self, profile: int) -> str:
        """The needs of one profile in words."""
        of_profile = self.profiles[profile]
        return (
            f"needs {format_bytes(self.total(profile))} of GPU memory: weights {format_bytes(self.weights)}, "
            f"activations {format_bytes(of_profile.activations)}, states {format_bytes(of_profile.states)}"
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "GpuMemory":
        """From the result of `dataclasses.asdict`, for example in a manifest."""
        names = [field.name for field in dataclasses.fields(ProfileMemory)]
        return cls(
            values["weights"],
            tuple(ProfileMemory(*(profile[name] for name in names)) for profile in values["profiles"]),
        )


def is_memory_figure(message: str) -> bool:
    """Whether `read_builder_memory` reads this message of the builder's log."""
    return _FIGURE.match(message) is not None


def read_builder_memory(messages: Iterable[str], profiles: int = 1) -> GpuMemory | None:
    """The device memory of an engine, without its states, from the log of its build.

    TensorRT logs figures for each optimization profile in turn, and those of the weights at the end, with
    severity VERBOSE or INFO. Seen with TensorRT for RTX 1.7; the wording is undocumented.

    Args:
        messages: Messages of the builder in order; others than figures of memory are ignored.
        profiles: Number of optimization profiles of the engine.

    Returns:
        None if a figure is missing.
    """
    weights, current = None, 0
    found: list[dict[str, int]] = [{} for _ in range(profiles)]
    for message in messages:
        if (match := _FIGURE.match(message)) is None:
            continue
        kind, value = str(match.lastgroup), int(match[str(match.lastgroup)])
        if kind == "profile":
            current = value
        elif kind == "weights":
            weights = value
        elif current < profiles:
            # Parts of a graph that are compiled on their own have figures too.
            found[current][kind] = max(value, found[current].get(kind, 0))
    if weights is None or not all("activations" in figures for figures in found):
        return None
    return GpuMemory(
        weights,
        tuple(
            ProfileMemory(
                activations=figures["activations"] + figures.get("persistent", 0),
                scratch=figures.get("scratch", 0),
            )
            for figures in found
        ),
    )


def describe_gpu_memory(memory: GpuMemory | None, profiles: Sequence[str]) -> list[str]:
    """The needs of each profile of an engine, a line each.

    Args:
        memory: Of the engine; None if its builder did not report it.
        profiles: Sizes of each profile, in words.
    """
    if memory is None:
        return ["needs an unknown amount of GPU memory: the builder did not report it"]
    return [f"{memory.describe(index)}, for {sizes}" for index, sizes in enumerate(profiles)]


def add_states(memory: GpuMemory, profiles: Iterable[ProfileShapes], states: Collection[str]) -> GpuMemory:
    """`memory` with the buffers of the float32 inputs `states`, at the largest shapes of each profile."""
    return dataclasses.replace(
        memory,
        profiles=tuple(
            dataclasses.replace(of_profile, states=states_memory(shapes, states))
            for of_profile, shapes in zip(memory.profiles, profiles, strict=True)
        ),
    )


def states_memory(shapes: ProfileShapes, states: Collection[str]) -> int:
    """Bytes of the buffers of the float32 inputs `states` at the largest shapes of a profile."""
    elements = sum(math.prod(shapes[name][2]) for name in states)
    return STATE_BUFFERS * _FLOAT32_BYTES * elements

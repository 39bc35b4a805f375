"""What a session asks of the library that runs an artefact."""

from collections.abc import Mapping
from typing import Protocol

from sws_export.runtime.inputs import Array

StateShapes = Mapping[str, tuple[int, ...]]


class Loop(Protocol):
    """One stream's place in device memory: two sets of state buffers that are used in turn.

    Of the two sets one is current: a run reads it, writes the other, and makes that one current only when it
    has succeeded. Nothing is copied from step to step.
    """

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Run one step and write the outputs, the states left out, into these arrays in host memory."""

    def read(self, name: str) -> Array:
        """A copy of the current state called `name`, float32, in host memory."""

    def write(self, name: str, values: Array) -> None:
        """Replace the current state called `name`."""


class Backend(Protocol):
    """A loaded artefact: weights, shared by any number of loops."""

    device: str
    """Where it runs: `cpu` or `cuda`."""

    def loop(self, states: StateShapes) -> Loop:
        """Buffers for one stream, all zero, of the shapes given by the names of the state inputs.

        Raises:
            EngineError: The device has no memory left.
        """

"""The interface of the libraries that run artefacts."""

from collections.abc import Mapping
from typing import Protocol

from sws_export.runtime.inputs import Array, Buffer

StateShapes = Mapping[str, tuple[int, ...]]
"""Shape of each state, by the name of its input."""


class Loop(Protocol):
    """The device memory of one stream: two sets of state buffers, used alternately.

    A step reads the current set and writes the other one, which becomes the current one if the step succeeds.
    Nothing is copied from step to step.
    """

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run one step and write its outputs, states excluded, into these arrays and tensors."""

    def read(self, name: str) -> Array:
        """A copy of a current state in host memory, float32."""

    def write(self, name: str, values: Array) -> None:
        """Replace a current state."""


class RuntimeBackend(Protocol):
    """An artefact loaded in a library; any number of loops share its weights."""

    device: str
    """`cpu` or `cuda`."""

    def loop(self, states: StateShapes) -> Loop:
        """Buffers for one stream, all zero.

        Raises:
            EngineError: The device has too little memory.
        """

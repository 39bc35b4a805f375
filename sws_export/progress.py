"""The progress protocol, through which long operations report stages and messages."""

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Stage(Protocol):
    """A running stage."""

    def advance(self, amount: float = 1.0) -> None:
        """Add `amount` to the completed part of the total."""

    def describe(self, text: str) -> None:
        """Set the description of the current work."""


class Progress(Protocol):
    """Receives stages, messages and warnings."""

    def stage(self, name: str, total: float | None = None) -> contextlib.AbstractContextManager[Stage]:
        """Open a stage; `total` is None if the amount of work is unknown."""

    def log(self, message: str) -> None:
        """Report information."""

    def warn(self, message: str) -> None:
        """Report a warning, on which the user should act."""


class _SilentStage:
    def advance(self, amount: float = 1.0) -> None:
        pass

    def describe(self, text: str) -> None:
        pass


class SilentProgress:
    """A `Progress` that discards everything; the default of the Python API."""

    @contextlib.contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Stage]:  # noqa: ARG002
        """Open a stage without output."""
        yield _SilentStage()

    def log(self, message: str) -> None:
        """Discard the message."""

    def warn(self, message: str) -> None:
        """Discard the warning."""

"""How long work tells that it is alive, without knowing who listens."""

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Stage(Protocol):
    """One stage of work in progress."""

    def advance(self, amount: float = 1.0) -> None:
        """Count `amount` more of the stage's total as done."""

    def describe(self, text: str) -> None:
        """Say what the stage is doing at the moment."""


class Progress(Protocol):
    """Receives stages, remarks and warnings."""

    def stage(self, name: str, total: float | None = None) -> contextlib.AbstractContextManager[Stage]:
        """Open a stage; `total` is None where the amount of work is unknown."""

    def log(self, message: str) -> None:
        """Say something a user wants to know once."""

    def warn(self, message: str) -> None:
        """Say something a user should act on."""


class _SilentStage:
    def advance(self, amount: float = 1.0) -> None:
        pass

    def describe(self, text: str) -> None:
        pass


class SilentProgress:
    """A `Progress` that says nothing: the default of the Python API."""

    @contextlib.contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Stage]:  # noqa: ARG002
        """Open a stage that nobody watches."""
        yield _SilentStage()

    def log(self, message: str) -> None:
        """Drop the remark."""

    def warn(self, message: str) -> None:
        """Drop the warning."""


class RecordingProgress:
    """A `Progress` that passes everything on and remembers the remarks and warnings."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.lines: list[tuple[bool, str]] = []
        """What was said, in order: (is a warning, text)."""

    def stage(self, name: str, total: float | None = None) -> contextlib.AbstractContextManager[Stage]:
        """Open a stage."""
        return self._progress.stage(name, total)

    def log(self, message: str) -> None:
        """Pass a remark on."""
        self.lines.append((False, message))
        self._progress.log(message)

    def warn(self, message: str) -> None:
        """Pass a warning on."""
        self.lines.append((True, message))
        self._progress.warn(message)

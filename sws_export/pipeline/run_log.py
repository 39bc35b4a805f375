"""The log of one run: stage timings and messages, shown to the user's progress as they come."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sws_export.progress import Progress, Stage
from sws_export.stage_timings import StageTiming, measure_stage


@dataclasses.dataclass
class Recorded:
    """What a part of a run logged, to be replayed by a later run that finds its result in the cache.

    Attributes:
        messages: (is a warning, text) in order.
        timings: Of the stages, in order.
    """

    messages: list[tuple[bool, str]] = dataclasses.field(default_factory=list)
    timings: list[StageTiming] = dataclasses.field(default_factory=list)

    def __add__(self, later: "Recorded") -> "Recorded":
        return Recorded(self.messages + later.messages, self.timings + later.timings)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Recorded":
        """The inverse of `to_json`."""
        messages = [(bool(warning), str(text)) for warning, text in values["messages"]]
        return Recorded(messages, [StageTiming(**timing) for timing in values["timings"]])


class RunLog:
    """A `Progress` that also measures stages and records what it is given."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._recordings: list[Recorded] = []
        self.timings: list[StageTiming] = []
        """Timings of the run so far, those of cached results included."""

    def stage(self, name: str, total: float | None = None) -> contextlib.AbstractContextManager[Stage]:
        """Open a stage; see `Progress`."""
        return self._progress.stage(name, total)

    def log(self, message: str) -> None:
        """Log a remark."""
        self._message(False, message)

    def warn(self, message: str) -> None:
        """Log a warning."""
        self._message(True, message)

    def _message(self, warning: bool, text: str) -> None:
        for recorded in self._recordings:
            recorded.messages.append((warning, text))
        (self._progress.warn if warning else self._progress.log)(text)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[StageTiming]:
        """Measure the block as the stage `name`; nothing is kept of a block that fails."""
        with measure_stage(name) as timing:
            yield timing
        self.timings.append(timing)
        for recorded in self._recordings:
            recorded.timings.append(timing)

    @contextlib.contextmanager
    def record(self, *, apart: bool = False) -> Iterator[Recorded]:
        """Record the messages and timings of the block, which outer recordings lack if it is `apart`."""
        recorded, around = Recorded(), self._recordings
        self._recordings = [recorded] if apart else [*around, recorded]
        try:
            yield recorded
        finally:
            self._recordings = around

    def discard(self, names: Collection[str]) -> None:
        """Remove the timings of cached results of the stages `names`: they could not be used."""
        self.timings = [timing for timing in self.timings if not (timing.cached and timing.name in names)]

    def replay(self, recorded: Recorded) -> None:
        """Log the messages of an earlier run again, and list its timings as those of cached results."""
        for warning, text in recorded.messages:
            self._message(warning, text)
        self.timings += [dataclasses.replace(timing, cached=True) for timing in recorded.timings]

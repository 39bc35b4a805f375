"""Export in a process of its own: `python -m sws_export.adapters.convert_process < request.json`.

For programs that cannot be blocked, or ended, by an export, such as ComfyUI. The request is a JSON object:
`parent` (process id), `model`, `out`, and the groups of options `source`, `sws`, `sizes` and `engine`, and
`backend`, as in `ExportOptions`. The answer is the events of `sws_export.engines.events` on standard output:

{"event": "stage", "name": ..., "total": ...}          a stage begins; `total` is null if it is not known
{"event": "advance", "amount": ...}                    a part of its total is complete
{"event": "describe", "text": ...}                     current work, for display
{"event": "log" | "warn", "text": ...}                 a message
{"event": "failed", "message": ...}                    nothing was written
{"event": "finished"}                                  the artefact is complete
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sws_export.engines.child import die_with_parent
from sws_export.engines.events import EventWriter
from sws_export.errors import SwsExportError
from sws_export.extras import missing_extras_as_errors

# A stage advances by bytes, thousands of times.
_SECONDS_BETWEEN_EVENTS = 0.1


class _Stage:
    def __init__(self, events: EventWriter) -> None:
        self._events = events
        self._amount, self._sent = 0.0, 0.0

    def advance(self, amount: float = 1.0) -> None:
        self._amount += amount
        if time.monotonic() - self._sent >= _SECONDS_BETWEEN_EVENTS:
            self.flush()

    def flush(self) -> None:
        if self._amount:
            self._events.send("advance", amount=self._amount)
            self._amount, self._sent = 0.0, time.monotonic()

    def describe(self, text: str) -> None:
        self._events.send("describe", text=text)


class _EventProgress:
    """A `Progress` that sends events."""

    def __init__(self, events: EventWriter) -> None:
        self._events = events

    @contextlib.contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[_Stage]:
        self._events.send("stage", name=name, total=total)
        stage = _Stage(self._events)
        yield stage
        stage.flush()

    def log(self, message: str) -> None:
        self._events.send("log", text=message)

    def warn(self, message: str) -> None:
        self._events.send("warn", text=message)


def main() -> int:
    """Export as specified by the request on standard input; returns 0 if the artefact is complete."""
    request = json.load(sys.stdin)
    die_with_parent(request["parent"])
    return convert(request, EventWriter())


def convert(request: dict[str, Any], events: EventWriter) -> int:
    """Export as specified by `request`, and send events; returns 0 if the artefact is complete."""
    try:
        with missing_extras_as_errors():
            _export(request, events)
    except SwsExportError as error:
        events.send("failed", message=str(error))
        return 1
    events.send("finished")
    return 0


def _export(request: dict[str, Any], events: EventWriter) -> None:
    from sws_export import EngineOptions, ExportOptions, SizeOptions, SourceOptions, SwsOptions, export

    source = dict(request["source"])
    if source.get("attention_head_dim"):
        source["attention_head_dim"] = tuple(source["attention_head_dim"])
    options = ExportOptions(
        source=SourceOptions(**source),
        sws=SwsOptions(**request["sws"]),
        sizes=SizeOptions(**request["sizes"]),
        engine=EngineOptions(**request["engine"]),
        backend=request["backend"],
    )
    export(Path(request["model"]), Path(request["out"]), options, _EventProgress(events))


if __name__ == "__main__":
    sys.exit(main())

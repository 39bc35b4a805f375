"""Events of the build process for its parent process: one JSON object for each line of a pipe.

{"event": "phase", "text": ...}                        current work, for display
{"event": "log", "severity": "warning", "text": ...}   a warning or error of the library
{"event": "failed", "error": ..., "message": ...}      class name in `sws_export.errors`
{"event": "not_written", "errno": ..., "path": ...}    the plan could not be written
{"event": "built", "layers": ..., ...}                 the plan is complete
"""

import json
import os
from collections.abc import Iterator
from typing import Any


class EventWriter:
    """The child's end of the pipe."""

    def __init__(self, descriptor: int) -> None:
        # A process started by the library must not keep the pipe open.
        os.set_inheritable(descriptor, False)
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")

    def send(self, event: str, **values: Any) -> None:
        """Send one event. If the parent has ended, nothing happens: the child is killed with it."""
        try:
            self._file.write(json.dumps({"event": event, **values}) + "\n")
            self._file.flush()
        except BrokenPipeError:
            pass


class EventReader:
    """The parent's end of the pipe."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._rest = b""

    def read(self) -> Iterator[dict[str, Any]] | None:
        """The events received, or None at the end of the pipe. Call it when the pipe is readable."""
        data = os.read(self.descriptor, 1 << 16)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return map(json.loads, lines)

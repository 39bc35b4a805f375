"""Events of the build process for its parent process: one JSON object per line of its standard output.

{"event": "phase", "text": ...}                        current work, for display
{"event": "log", "severity": "warning", "text": ...}   a warning or error of the library
{"event": "failed", "error": ..., "message": ...}      class name in `sws_export.errors`
{"event": "not_written", "errno": ..., "path": ...}    the plan could not be written
{"event": "built", "layers": ..., ...}                 the plan is complete
"""

import json
import os
import queue
import threading
from typing import IO, Any

_STDOUT, _STDERR = 1, 2


class EventWriter:
    """The child's end of the pipe. From its creation on, libraries that print write to standard error."""

    def __init__(self) -> None:
        # The duplicate is not inherited: a process started by the library must not keep the pipe open.
        self._file = os.fdopen(os.dup(_STDOUT), "w", encoding="utf-8")
        os.dup2(_STDERR, _STDOUT)

    def send(self, event: str, **values: Any) -> None:
        """Send one event. If the parent has ended, nothing happens: the child is killed with it."""
        try:
            self._file.write(json.dumps({"event": event, **values}) + "\n")
            self._file.flush()
        except BrokenPipeError:
            pass


class EventReader:
    """The parent's end of the pipe, read by a thread: Windows cannot wait for a pipe with a timeout."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._pipe:
            self._lines.put(line)
        self._lines.put(None)

    def next_event(self, timeout: float) -> dict[str, Any] | None:
        """The next event, or None if there is none within `timeout` seconds.

        Raises:
            EOFError: The child has closed the pipe.
        """
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            return None
        if line is None:
            raise EOFError
        event: dict[str, Any] = json.loads(line)
        return event

"""Log and progress of TensorRT as events.

TensorRT calls these objects from C++, also from other threads; an exception there would end the process.
"""

import time
from typing import Any

from sws_export.engines.events import EventWriter
from sws_export.engines.gpu_memory import is_memory_figure

_STEP_INTERVAL = 0.1
"""Least seconds between two events about steps, because small graphs have thousands of short steps."""


def make_logger(trt: Any, events: EventWriter) -> Any:
    """An `ILogger` that forwards warnings and errors.

    It keeps the first error in `first_error`, and the messages about GPU memory in `memory_messages`.
    """
    severities = trt.ILogger.Severity

    class EventLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.first_error: str | None = None
            self.memory_messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity > severities.WARNING:
                if is_memory_figure(message):
                    self.memory_messages.append(message)
                return
            text = " ".join(message.split())
            is_error = severity < severities.WARNING
            if is_error and self.first_error is None:
                self.first_error = text
            events.send("log", severity="error" if is_error else "warning", text=text)

    return EventLogger()


def make_monitor(trt: Any, events: EventWriter) -> Any:
    """An `IProgressMonitor` that forwards the current phase and step."""

    class EventMonitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._last = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            self._steps[phase_name] = num_steps
            events.send("phase", text=phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            now = time.monotonic()
            if now - self._last >= _STEP_INTERVAL:
                self._last = now
                events.send("phase", text=f"{phase_name} {step + 1}/{self._steps.get(phase_name, 0)}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return EventMonitor()

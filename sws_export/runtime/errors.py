"""Errors of a running session; an engine that cannot be loaded is an `EngineError`."""

from sws_export.errors import SwsExportError


class StepError(SwsExportError):
    """A step was given an input that is missing, unknown, or of a shape or value the engine does not take."""

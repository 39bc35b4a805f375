"""Running what was exported: sessions that carry the state, samplers, and adapters for other programs."""

from sws_export.errors import StepError
from sws_export.runtime.session import Session, Stream

__all__ = ["Session", "StepError", "Stream"]

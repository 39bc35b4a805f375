"""Running exported artefacts: sessions that feed the state from step to step.

Needs numpy and a runtime library. torch is imported only for callers that pass torch tensors.
"""

from sws_export.errors import StepError
from sws_export.runtime.session import Session, Stream

__all__ = ["Session", "StepError", "Stream"]

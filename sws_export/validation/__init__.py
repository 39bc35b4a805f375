"""Does the exported graph compute what the reference computes, over several steps with its state fed back?"""

from sws_export.validation.compare import OutputDifference
from sws_export.validation.validate import (
    SwsSpec,
    ValidationReport,
    validate_against_plain,
    validate_against_reference,
)

__all__ = [
    "OutputDifference",
    "SwsSpec",
    "ValidationReport",
    "validate_against_plain",
    "validate_against_reference",
]

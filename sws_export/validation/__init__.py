"""Compare an exported graph with its reference over several sampling steps, with the state fed back."""

from sws_export.validation.compare import OutputDifference
from sws_export.validation.sws_spec import SwsSpec
from sws_export.validation.validate import (
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

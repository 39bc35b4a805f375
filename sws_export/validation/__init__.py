"""Compare an exported graph with its reference over several sampling steps, with the state fed back."""

from sws_export.validation.compare import OutputDifference, require_tolerances
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
    "require_tolerances",
    "validate_against_plain",
    "validate_against_reference",
]

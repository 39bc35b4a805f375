"""The options of an export, in groups; each group declares its own command-line arguments."""

from sws_export.options.engine import EngineOptions
from sws_export.options.export import ArtefactKind, ExportOptions, artefact_kind
from sws_export.options.quantization import QuantizationOptions
from sws_export.options.sizes import SizeOptions
from sws_export.options.source import SourceOptions
from sws_export.options.sws import SwsOptions

__all__ = [
    "ArtefactKind",
    "EngineOptions",
    "ExportOptions",
    "QuantizationOptions",
    "SizeOptions",
    "SourceOptions",
    "SwsOptions",
    "artefact_kind",
]

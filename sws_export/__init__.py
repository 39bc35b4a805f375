"""Stable-Diffusion UNets with Sigma-Weighted Shuffle attention, as ONNX graphs and TensorRT engines.

    report = sws_export.export("unet.safetensors", "engine.plan")

does what the command `sws-export unet.safetensors --out engine.plan` does.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sws_export.errors import SwsExportError
from sws_export.extras import missing_extras_as_errors

if TYPE_CHECKING:
    from sws_export.options import (
        EngineOptions,
        ExportOptions,
        QuantizationOptions,
        SizeOptions,
        SourceOptions,
        SwsOptions,
    )
    from sws_export.parameters import SwsParameters
    from sws_export.pipeline.run import ExportReport, export
    from sws_export.pipeline.validate import validate

__all__ = [
    "EngineOptions",
    "ExportOptions",
    "ExportReport",
    "QuantizationOptions",
    "SizeOptions",
    "SourceOptions",
    "SwsExportError",
    "SwsOptions",
    "SwsParameters",
    "export",
    "validate",
]

_MODULES = {
    "ExportReport": "sws_export.pipeline.run",
    "SwsParameters": "sws_export.parameters",
    "export": "sws_export.pipeline.run",
    "validate": "sws_export.pipeline.validate",
} | dict.fromkeys(
    ("EngineOptions", "ExportOptions", "QuantizationOptions", "SizeOptions", "SourceOptions", "SwsOptions"),
    "sws_export.options",
)


def __getattr__(name: str) -> Any:
    """Import on first use: `import sws_export` alone loads no library."""
    if name not in _MODULES:
        raise AttributeError(f"module 'sws_export' has no attribute '{name}'")
    with missing_extras_as_errors():
        return getattr(importlib.import_module(_MODULES[name]), name)

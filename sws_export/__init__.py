"""Stable-Diffusion UNets with Sigma-Weighted Shuffle attention, as ONNX graphs and TensorRT engines.

    report = sws_export.export("unet.safetensors", "engine.plan")

does what the command `sws-export unet.safetensors --out engine.plan` does.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sws_export.errors import SwsExportError

if TYPE_CHECKING:
    from sws_export.options.options import ExportOptions
    from sws_export.parameters import SwsParameters
    from sws_export.pipeline.run import ExportReport, export

__all__ = ["ExportOptions", "ExportReport", "SwsExportError", "SwsParameters", "export"]

_HOMES = {
    "ExportOptions": "sws_export.options.options",
    "ExportReport": "sws_export.pipeline.run",
    "SwsParameters": "sws_export.parameters",
    "export": "sws_export.pipeline.run",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import sws_export` alone loads no library."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sws_export' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""What an export will need, before any long work, and what the machine has."""

import dataclasses
import shutil
from pathlib import Path

import psutil

from sws_export.contract import Precision
from sws_export.engines import Backend, engine_memory_estimate
from sws_export.options import ExportOptions
from sws_export.sources import Source

_BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
# Measured on SD1.5 and SDXL in float16: 0.67 and 0.8 GB. The weights are not read before they are written.
_EXPORT_MEMORY = 800_000_000
# On top of that, for a piece of the graph in ONNX Runtime and its float32 copies; 0.6 GB measured on SD1.5. A
# graph of one piece holds them all.
_PIECES_MEMORY = 800_000_000
_RUNTIME_FACTOR = 5


@dataclasses.dataclass(frozen=True)
class Preflight:
    """Expected needs of each stage in bytes, and what there is.

    Attributes:
        memory: Peak memory by stage.
        disk: Space for the artefacts and what is staged on the way.
        graph_size: Bytes of the ONNX graph with its weights.
        available_memory: Memory that is free now.
        free_disk: Space that is free where the artefacts go.
    """

    memory: dict[str, int]
    disk: int
    graph_size: int
    available_memory: int
    free_disk: int

    def describe(self) -> list[str]:
        """The needs in words."""
        stages = ", ".join(f"{stage} {size / 1e9:.1f} GB" for stage, size in self.memory.items())
        return [
            f"expected memory: {stages}; {self.available_memory / 1e9:.1f} GB available",
            f"expected disk: {self.disk / 1e9:.2f} GB, of it the graph {self.graph_size / 1e9:.2f} GB; "
            f"{self.free_disk / 1e9:.1f} GB free",
        ]

    def shortages(self) -> list[str]:
        """What will probably not fit."""
        found = [
            f"{stage} needs about {size / 1e9:.1f} GB of memory and {self.available_memory / 1e9:.1f} GB are "
            "available; it may be killed"
            for stage, size in self.memory.items()
            if size > self.available_memory
        ]
        if self.disk > self.free_disk:
            found.append(
                f"about {self.disk / 1e9:.1f} GB of disk are needed, {self.free_disk / 1e9:.1f} GB are free"
            )
        return found


def preflight(source: Source, backend: Backend | None, options: ExportOptions, out: Path) -> Preflight:
    """Estimate memory and disk; the factors are measured ones, see docs/full-size.md."""
    weights = source.parameters * _BYTES[source.precision]
    memory = {"export": _EXPORT_MEMORY}
    if options.validate:
        memory["validation"] = _EXPORT_MEMORY + min(weights * _RUNTIME_FACTOR, _PIECES_MEMORY)
    if backend is not None:
        memory["engine build"] = engine_memory_estimate(weights, backend)
    disk = weights * (2 if backend is not None else 1)
    return Preflight(
        memory=memory,
        disk=disk,
        graph_size=weights,
        available_memory=psutil.virtual_memory().available,
        free_disk=shutil.disk_usage(out.parent).free,
    )

"""What one export has to do and with what."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from sws_export.cache import Cache
from sws_export.options.options import ExportOptions
from sws_export.pipeline.engine_config import EngineConfig
from sws_export.pipeline.rewrite import Target
from sws_export.progress import Progress
from sws_export.sources.source import Source


@dataclasses.dataclass(frozen=True)
class Job:
    """One export, decided and not begun.

    Attributes:
        source: What is exported.
        options: What was asked for.
        out: The artefact.
        engine: None for an ONNX graph.
        target: Runtime that the graph is for.
        sizes: batch, height and width (latent) and tokens, as far as the graph is fixed to them.
        cache: Results of earlier runs.
        progress: Hears of the stages.
    """

    source: Source
    options: ExportOptions
    out: Path
    engine: EngineConfig | None
    target: Target
    sizes: Mapping[str, int]
    cache: Cache
    progress: Progress

    @property
    def what(self) -> str:
        """The export in a few words, for lists."""
        method = "plain" if self.options.plain else self.options.preset
        return f"{self.source.path.name}, {self.source.precision}, {method}, for {self.target}"

    @property
    def keeps_graph(self) -> bool:
        """Whether the graph is an artefact."""
        return self.engine is None or self.options.keep_onnx

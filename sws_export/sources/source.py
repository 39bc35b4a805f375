"""Where an export starts: a checkpoint, or a plain ONNX graph. Both offer the same steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from sws_export.errors import OptionError
from sws_export.options.options import ExportOptions
from sws_export.progress import Progress
from sws_export.sources.checkpoint import open_checkpoint_source
from sws_export.sources.onnx import GraphSource
from sws_export.sources.plain_graph import open_graph
from sws_export.tensors import Precision, TensorSpec
from sws_export.validation import SwsSpec, ValidationReport


class Source(Protocol):
    """A UNet to be exported."""

    @property
    def path(self) -> Path:
        """What the user named."""

    @property
    def precision(self) -> Precision:
        """Precision of the exported UNet."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The UNet's inputs, without those of SWS."""

    @property
    def config(self) -> dict[str, Any] | None:
        """The UNet's configuration, where it is known."""

    @property
    def multiple(self) -> int:
        """What height and width of the latent must be multiples of."""

    @property
    def vae_scale(self) -> int | None:
        """Pixels a latent value covers, where it is known."""

    @property
    def parameters(self) -> int:
        """Number of parameters."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold graph and weights."""

    @property
    def converts(self) -> bool:
        """Whether weights are changed on their way into the graph."""

    def identity(self, sha256: str) -> dict[str, Any]:
        """What an export of it depends on, as JSON values, where `sha256` is that of its files."""

    def weights(self) -> Mapping[str, ir.TensorProtocol]:
        """The weights of the plain graph by name, not read yet where they are large."""

    def describe(self) -> list[str]:
        """What it is, for the log."""

    def verify(self, progress: Progress) -> dict[str, Any]:
        """Check the weights; returns what the manifest says of the source, its sha256 included."""

    def plain_model(self, progress: Progress) -> ir.Model:
        """The UNet as a plain graph."""

    def validate(
        self,
        onnx_path: Path,
        shuffled: SwsSpec,
        progress: Progress,
    ) -> ValidationReport:
        """Compare the exported graph with what it should compute."""


def open_source(model: Path, options: ExportOptions, progress: Progress) -> Source:
    """Find out what `model` is, reading headers only.

    Raises:
        CheckpointError: There is no UNet at `model`.
        OptionError: An option does not fit this kind of source.
    """
    if model.suffix == ".onnx":
        if options.precision is not None or options.config is not None or options.plain or options.loras:
            raise OptionError(
                f"{model} is a graph already: its precision, architecture and weights are fixed; "
                "leave out --precision, --config, --plain and --lora, or export the checkpoint"
            )
        return GraphSource(open_graph(model))
    return open_checkpoint_source(model, options, progress)

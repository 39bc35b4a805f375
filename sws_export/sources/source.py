"""The interface of every source of an export."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from sws_export.checkpoint import WeightShapes
from sws_export.errors import OptionError
from sws_export.files import HashedCopy
from sws_export.manifest import QuantizationEntry, SourceEntry
from sws_export.options import ExportOptions
from sws_export.options.arguments import changed_options
from sws_export.progress import Progress
from sws_export.sources.checkpoint import open_checkpoint_source
from sws_export.sources.onnx import open_onnx_source
from sws_export.tensors import Precision, TensorSpec
from sws_export.validation import SwsSpec, ValidationReport


class Source(Protocol):
    """A UNet to be exported."""

    @property
    def path(self) -> Path:
        """The path that the user gave."""

    @property
    def name(self) -> str:
        """Name of the model, for manifests: that of the file or directory, or of the repository."""

    @property
    def precision(self) -> Precision:
        """Precision of the exported UNet."""

    @property
    def precision_reason(self) -> str:
        """Why it has this precision, for the log."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The UNet's inputs, without those of SWS."""

    @property
    def config(self) -> dict[str, Any] | None:
        """The UNet's configuration; None if it is unknown."""

    @property
    def size_multiple(self) -> int:
        """Height and width of the latent must be multiples of it."""

    @property
    def vae_scale(self) -> int | None:
        """Pixels per latent element in each direction; None if it is unknown."""

    @property
    def parameter_count(self) -> int:
        """Number of parameters."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files with the graph and the weights."""

    @property
    def files_read(self) -> tuple[Path, ...]:
        """`files`, and those of LoRAs."""

    @property
    def whole_files(self) -> tuple[Path, ...]:
        """`files`, if nearly all of their bytes are weights of the plain graph as they are; else none."""

    @property
    def converts(self) -> bool:
        """Whether weights are changed on their way into the graph."""

    @property
    def quantization(self) -> QuantizationEntry | None:
        """The 8-bit weights of a graph that has them already."""

    def identity(self, sha256: str) -> dict[str, Any]:
        """What an export depends on, as JSON values; `sha256` is the digest of the files."""

    def trace_identity(self) -> dict[str, Any] | None:
        """What the plain graph depends on besides its weights, as JSON values; None if it is not traced."""

    def weights(self) -> Mapping[str, ir.TensorProtocol]:
        """The weights of the plain graph by name; large ones are not read yet."""

    def describe(self) -> list[str]:
        """A description for the log, a line each."""

    def check(self, progress: Progress, shapes: WeightShapes | None = None) -> WeightShapes | None:
        """Compare names and shapes of the weights with `shapes`, those that the architecture needs.

        Args:
            progress: Receives the stage and warnings.
            shapes: None to derive them from the configuration.

        Returns:
            `shapes`; None for a graph.
        """

    def read_weights(self, progress: Progress, copy: HashedCopy | None = None) -> str:
        """Check all weights for NaN and Inf; returns the sha256 of the bytes that were read, in hex.

        It may run in another thread than the other methods. `copy` receives the bytes of all files; only a
        source with `whole_files` has it.
        """

    def entry(self, sha256: str) -> SourceEntry:
        """The manifest's description of the source; `sha256` is the digest of the files."""

    def plain_model(self, progress: Progress) -> ir.Model:
        """The UNet as a plain graph."""

    def validate(
        self,
        onnx_path: Path,
        sws_spec: SwsSpec,
        progress: Progress,
        unquantized: ir.Model | None = None,
    ) -> ValidationReport:
        """Compare the exported graph with what it should compute.

        Args:
            onnx_path: The exported graph.
            sws_spec: Its SWS and the format of its weights.
            progress: Receives the stage.
            unquantized: The same graph with its weights as in the source, whose error is reported, too.
        """


def open_source(model: Path, options: ExportOptions, progress: Progress, *, engine: bool = False) -> Source:
    """Determine what `model` is, from headers only.

    Args:
        model: A checkpoint or a plain ONNX graph.
        options: Of the export.
        progress: Receives the stage and warnings.
        engine: Whether an engine is built, whose default precision is another one than that of a graph.

    Raises:
        CheckpointError: There is no UNet at `model`.
        OptionError: An option does not fit this kind of source.
    """
    if model.suffix != ".onnx":
        activations = options.quantization.activations
        half = engine or activations is not None
        checkpoint = open_checkpoint_source(model, options.source, progress, engine=half)
        if activations is None:
            return checkpoint
        return dataclasses.replace(checkpoint, precision_reason=f"that of all but the {activations} layers")
    given = [*changed_options(options.source).values(), *(["--plain"] if options.sws.plain else [])]
    for option in given:
        raise OptionError(
            f"{model} is a graph already: {option} applies to checkpoints only; leave it out, or export the "
            "checkpoint"
        )
    source = open_onnx_source(model)
    if source.quantization and options.quantization.weight_format:
        option = "--weights" if options.quantization.weights else "--precision"
        raise OptionError(
            f"{model} has {source.quantization['weights']} weights already; leave out {option}, "
            "or give the checkpoint"
        )
    return source

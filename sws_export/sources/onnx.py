"""A plain ONNX graph as the start of an export."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sws_export.progress import Progress
from sws_export.sources.plain_graph import PlainGraph
from sws_export.tensors import Precision, TensorSpec
from sws_export.validation import SwsSpec, ValidationReport, validate_against_plain
from sws_export.validation.validate import TOKENS


@dataclasses.dataclass(frozen=True)
class GraphSource:
    """A plain ONNX graph exported earlier."""

    graph: PlainGraph

    @property
    def path(self) -> Path:
        """What the user named."""
        return self.graph.path

    @property
    def precision(self) -> Precision:
        """That of the graph."""
        return self.graph.precision

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """As the graph declares them."""
        return self.graph.inputs

    @property
    def config(self) -> None:
        """Unknown."""

    @property
    def multiple(self) -> int:
        """One halving a level but the last, counted from the names of the blocks."""
        return self.graph.multiple

    @property
    def vae_scale(self) -> int | None:
        """As the export of the graph recorded it; else unknown."""
        return self.graph.vae_scale

    @property
    def parameters(self) -> int:
        """Elements of all initializers."""
        return self.graph.parameters

    @property
    def files(self) -> tuple[Path, ...]:
        """The ONNX file and those of its external weights."""
        return self.graph.files

    @property
    def converts(self) -> bool:
        """Never."""
        return False

    def identity(self, sha256: str) -> dict[str, Any]:
        """What the manifest says of it."""
        return self._describe(sha256)

    def weights(self) -> Mapping[str, ir.TensorProtocol]:
        """As the graph was read."""
        return self.graph.weights

    def describe(self) -> list[str]:
        """Size and precision."""
        return [f"plain ONNX graph, {self.parameters / 1e6:.1f} M parameters, {self.precision}"]

    def verify(self, progress: Progress) -> dict[str, Any]:
        """Look at all weights and hash the files.

        Raises:
            CheckpointError: A weight holds NaN or Inf.
        """
        self.graph.require_finite()
        return self._describe(self.graph.digest(progress))

    def _describe(self, sha256: str) -> dict[str, Any]:
        return {"kind": "onnx", "file": self.path.name, "sha256": sha256}

    def plain_model(self, progress: Progress) -> ir.Model:  # noqa: ARG002  (nothing to wait for)
        """The graph as it was read."""
        return self.graph.model

    def validate(
        self,
        onnx_path: Path,
        shuffled: SwsSpec,
        progress: Progress,
    ) -> ValidationReport:
        """Against the plain graph at intensity 0."""
        sizes = {"batch": 2, "height": 4 * self.multiple, "width": 3 * self.multiple, "tokens": TOKENS}
        for spec in self.inputs:
            for axis, name in enumerate(("batch", "", "height", "width")):
                if spec.name == "sample" and name and isinstance(spec.shape[axis], int):
                    sizes[name] = int(spec.shape[axis])
        return validate_against_plain(
            onnx_path, self.path, self.inputs, sizes, shuffled, self.precision, progress
        )

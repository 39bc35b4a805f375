"""A plain ONNX graph exported earlier, as the source of an export."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graph_passes.find_sites import count_levels
from graph_passes.name_nodes import NameNodes
from sws_export.checkpoint import WeightShapes
from sws_export.errors import CheckpointError, ExportError
from sws_export.files import HashedCopy
from sws_export.manifest import QuantizationEntry, SourceEntry, read_embedded
from sws_export.onnx_files import copy_external, graph_specs, load_onnx
from sws_export.progress import Progress
from sws_export.sources.other_exporters import OriginalGraph, adapt, rename_inputs
from sws_export.tensors import PRECISIONS, SIZE_AXES, Precision, TensorSpec
from sws_export.validation import SwsSpec, ValidationReport, validate_against_plain
from sws_export.validation.sizes import TOKENS

_CHUNK = 2**22
_INPUTS = ("sample", "timestep", "encoder_hidden_states")
_OUTPUT = "out_sample"


@dataclasses.dataclass(frozen=True)
class OnnxSource:
    """A plain ONNX graph on disk; see `Source`.

    Attributes:
        path: The file.
        model: The graph; large weights stay on disk.
        inputs: Its inputs, with the symbols of `SIZE_AXES` as their dynamic dimensions.
        precision: Precision of the UNet.
        vae_scale: Pixels per latent element, if the exporter recorded it.
        files: The ONNX file, and those of its external weights sorted by name.
        original_weights: Its weights by name, also after the rewrite of `model`.
        original: How the file has to be run, if `model` differs from it.
        quantization: Its 8-bit weights, if sws-export wrote them.
    """

    path: Path
    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    precision: Precision
    vae_scale: int | None
    files: tuple[Path, ...]
    original_weights: Mapping[str, ir.TensorProtocol]
    original: OriginalGraph
    quantization: QuantizationEntry | None = None

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.name

    @property
    def precision_reason(self) -> str:
        """Why the graph has this precision."""
        return "that of the graph"

    @property
    def config(self) -> None:
        """None: a graph has no configuration."""

    @property
    def files_read(self) -> tuple[Path, ...]:
        """The same as `files`."""
        return self.files

    @property
    def whole_files(self) -> tuple[Path, ...]:
        """None: the weights of the graph are written one by one."""
        return ()

    @property
    def converts(self) -> bool:
        """False: the weights are used as stored."""
        return False

    @property
    def size_multiple(self) -> int:
        """Required divisor of the latent's height and width, from the names of the blocks."""
        return int(2 ** (count_levels(self.model) - 1))

    @property
    def parameter_count(self) -> int:
        """Elements of all initializers."""
        return sum(
            math.prod(value.shape.numpy()) for value in self.model.graph.initializers.values() if value.shape
        )

    def identity(self, sha256: str) -> dict[str, Any]:
        """The manifest's entry of the graph."""
        return dict(self.entry(sha256))

    def trace_identity(self) -> None:
        """None: the graph is read from its file."""

    def weights(self) -> Mapping[str, ir.TensorProtocol]:
        """The weights of the graph as it was read, by name."""
        return self.original_weights

    def describe(self) -> list[str]:
        """Number of parameters and precision, a line each."""
        return [
            f"plain ONNX graph, {self.parameter_count / 1e6:.1f} M parameters",
            f"precision: {self.precision}, {self.precision_reason}",
        ]

    def check(self, progress: Progress, shapes: WeightShapes | None = None) -> None:
        """Do nothing: names and shapes are those of the graph."""

    def read_weights(self, progress: Progress, copy: HashedCopy | None = None) -> str:  # noqa: ARG002
        """Check all weights and hash the files: the ONNX file, then its external weights by name.

        Raises:
            CheckpointError: A weight has NaN or Inf.
        """
        self._require_finite()
        digest = hashlib.sha256()
        with progress.stage("hash", total=sum(file.stat().st_size for file in self.files)) as stage:
            for file in self.files:
                with file.open("rb") as stream:
                    while chunk := stream.read(_CHUNK):
                        digest.update(chunk)
                        stage.advance(len(chunk))
        return digest.hexdigest()

    def entry(self, sha256: str) -> SourceEntry:
        """Name, digest and size multiple."""
        return {"kind": "onnx", "file": self.name, "sha256": sha256, "size_multiple": self.size_multiple}

    def _require_finite(self) -> None:
        """Look for NaN and Inf among the weights; scalars are limits, which may be infinite."""
        for name, shared in self.original_weights.items():
            # A mapping of its own: another thread may rewrite the graph and release those of the graph.
            tensor = copy_external(shared) if isinstance(shared, ir.ExternalTensor) else shared
            if tensor.size <= 1 or not tensor.dtype.is_floating_point():
                continue
            if not np.isfinite(tensor.numpy().astype(np.float32, copy=False)).all():
                raise CheckpointError(
                    f"{self.path}: weight '{name}' has NaN or Inf; the model is broken (often by a "
                    "conversion to fp16): export it again from another copy"
                )

    def plain_model(self, progress: Progress) -> ir.Model:  # noqa: ARG002  (nothing to wait for)
        """The graph as it was read."""
        return self.model

    def validate(
        self,
        onnx_path: Path,
        sws_spec: SwsSpec,
        progress: Progress,
        unquantized: ir.Model | None = None,
    ) -> ValidationReport:
        """Compare with the plain graph at intensity 0."""
        sizes = {
            "batch": 2,
            "height": 4 * self.size_multiple,
            "width": 3 * self.size_multiple,
            "tokens": TOKENS,
        }
        sample = next(spec for spec in self.inputs if spec.name == "sample")
        sizes |= {
            name: size
            for name, (tensor, axis) in SIZE_AXES.items()
            if tensor == "sample" and isinstance(size := sample.shape[axis], int)
        }
        return validate_against_plain(
            onnx_path,
            self.path,
            self.inputs,
            sizes,
            sws_spec,
            self.precision,
            progress,
            self.original,
            unquantized,
        )


def open_onnx_source(path: Path) -> OnnxSource:
    """Read a UNet exported to ONNX without SWS.

    Raises:
        CheckpointError: The file or its weights are missing or damaged, or it is no ONNX model.
        ExportError: It is not a UNet with diffusers' or ComfyUI's input names, has SWS already, or is of an
            older opset without attention that is recognized.
    """
    model = load_onnx(path)
    _check_weight_files(path, model)
    NameNodes()(model)
    names = rename_inputs(model)
    _check_names(path, model)
    original = adapt(path, model, names)
    _name_dimensions(path, model)
    inputs = graph_specs(model.graph.inputs)
    recorded = read_embedded(path)
    weights = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    external = {Path(tensor.path) for tensor in weights.values() if isinstance(tensor, ir.ExternalTensor)}
    return OnnxSource(
        path=path,
        model=model,
        inputs=inputs,
        precision=_precision(path, inputs[0].dtype),
        vae_scale=recorded["source"].get("vae_scale") if recorded else None,
        files=(path, *sorted(external)),
        original_weights=weights,
        original=original,
        quantization=recorded.get("quantization") if recorded else None,
    )


def _precision(path: Path, dtype: str) -> Precision:
    for precision, found in PRECISIONS.items():
        if found.dtype == dtype:
            return precision
    raise ExportError(f"{path}: expected a sample of float32, float16 or bfloat16, found {dtype}")


def _check_weight_files(path: Path, model: ir.Model) -> None:
    """Reject a graph whose external weights are missing or cut short; they are read much later."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = Path(tensor.path)
        if not file.is_file():
            raise CheckpointError(
                f"{path}: its weights are missing: expected them in {file}; fetch that file too"
            )
        end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if file.stat().st_size < end:
            raise CheckpointError(
                f"{file} is truncated: expected at least {end} bytes for {value.name}, "
                f"found {file.stat().st_size}; fetch it again"
            )


def _check_names(path: Path, model: ir.Model) -> None:
    """Reject a graph that is no plain UNet, by the names of its inputs and output."""
    inputs = [value.name for value in model.graph.inputs]
    if "intensity" in inputs:
        raise ExportError(f"{path} has SWS already; give the checkpoint or a graph exported with --plain")
    outputs = [value.name for value in model.graph.outputs]
    if inputs[: len(_INPUTS)] != list(_INPUTS) or outputs != [_OUTPUT]:
        raise ExportError(
            f"{path}: expected a UNet with the inputs {', '.join(_INPUTS)}, … and the output {_OUTPUT}, "
            f"found {', '.join(map(str, inputs))} -> {', '.join(map(str, outputs))}; "
            "export it under diffusers' names"
        )


def _name_dimensions(path: Path, model: ir.Model) -> None:
    """Give the dynamic dimensions the symbols of `SIZE_AXES`, whatever the exporter called them."""
    for value in model.graph.inputs:
        symbols = _symbols(str(value.name))
        if value.shape is None or len(value.shape) <= max(symbols):
            raise ExportError(
                f"{path}: input {value.name} has the shape {value.shape}, which is not a UNet's"
            )
        value.shape = _renamed(value.shape, symbols)
    output = model.graph.outputs[0]
    if output.shape is not None and len(output.shape) == 4:
        output.shape = _renamed(output.shape, _symbols("sample"))


def _symbols(name: str) -> dict[int, str]:
    """The symbols of an input's dimensions by their axis; the first is the batch in all inputs."""
    return {0: "batch"} | {axis: size for size, (tensor, axis) in SIZE_AXES.items() if tensor == name}


def _renamed(shape: ir.Shape, symbols: dict[int, str]) -> ir.Shape:
    dims: list[Any] = list(shape)
    for axis, symbol in symbols.items():
        if not isinstance(dims[axis], int):
            dims[axis] = symbol
    return ir.Shape(dims)

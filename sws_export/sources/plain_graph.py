"""A plain ONNX graph exported earlier, as the start of an export."""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graph_passes.find_sites import count_levels
from graph_passes.name_nodes import NameNodes
from sws_export import manifest
from sws_export.errors import CheckpointError, ExportError
from sws_export.onnx_files import graph_specs, load_onnx
from sws_export.progress import Progress
from sws_export.tensors import Precision, TensorSpec
from sws_export.tracing.export_unet import OPSET

_CHUNK = 2**22
_PRECISIONS: dict[str, Precision] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# Positions of the dimensions that may vary, whatever the exporter called them.
_DIMENSIONS = {
    "sample": {0: "batch", 2: "height", 3: "width"},
    "timestep": {0: "batch"},
    "encoder_hidden_states": {0: "batch", 1: "tokens"},
}
_OUTPUT = "out_sample"


@dataclasses.dataclass(frozen=True)
class PlainGraph:
    """A plain ONNX graph on disk, ready for the rewrite.

    Attributes:
        path: The file.
        model: The graph; large weights stay on disk.
        inputs: Its inputs under the contract's names for dimensions.
        precision: Precision of the UNet.
        vae_scale: Pixels a latent value covers, where the exporter recorded it.
        files: The ONNX file, and those of its external weights in the order of their names.
        weights: Its weights by name, whatever becomes of `model`.
    """

    path: Path
    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    precision: Precision
    vae_scale: int | None
    files: tuple[Path, ...]
    weights: dict[str, ir.TensorProtocol]

    @property
    def multiple(self) -> int:
        """What height and width of the latent must be multiples of."""
        return int(2 ** (count_levels(self.model) - 1))

    @property
    def parameters(self) -> int:
        """Elements of all initializers."""
        return sum(
            math.prod(value.shape.numpy()) for value in self.model.graph.initializers.values() if value.shape
        )

    def require_finite(self) -> None:
        """Look for NaN and Inf among the weights; single numbers are limits, which may be infinite.

        Raises:
            CheckpointError: Names the first such weight.
        """
        for value in self.model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.size <= 1 or not tensor.dtype.is_floating_point():
                continue
            if not np.isfinite(tensor.numpy().astype(np.float32, copy=False)).all():
                raise CheckpointError(
                    f"{self.path}: weight '{value.name}' holds NaN or Inf; the model is broken (often by a "
                    "conversion to fp16): export it again from another copy"
                )

    def digest(self, progress: Progress) -> str:
        """sha256 of the ONNX file's bytes, external weights after them in the order of their names."""
        digest = hashlib.sha256()
        with progress.stage("hash", total=sum(file.stat().st_size for file in self.files)) as stage:
            for file in self.files:
                with file.open("rb") as stream:
                    while chunk := stream.read(_CHUNK):
                        digest.update(chunk)
                        stage.advance(len(chunk))
        return digest.hexdigest()


def open_graph(path: Path) -> PlainGraph:
    """Read a UNet exported to ONNX without SWS.

    Raises:
        CheckpointError: The file or its weights are missing or damaged, or it is no ONNX model.
        ExportError: It is not a UNet with diffusers' input names, has SWS already, or is of an older opset.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    model = load_onnx(path)
    opset = model.graph.opset_imports.get("", 0)
    if opset < OPSET:
        raise ExportError(
            f"{path}: expected opset {OPSET} or later, found {opset}; export the checkpoint with sws-export "
            "or with torch.onnx.export(dynamo=True, opset_version=23)"
        )
    _check_weight_files(path, model)
    _name_dimensions(path, model)
    NameNodes()(model)
    inputs = graph_specs(model.graph.inputs)
    precision = _PRECISIONS.get(inputs[0].dtype)
    if precision is None:
        raise ExportError(
            f"{path}: expected a sample of float32, float16 or bfloat16, found {inputs[0].dtype}"
        )
    recorded = manifest.embedded(model) or {}
    weights = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    external = {Path(tensor.path) for tensor in weights.values() if isinstance(tensor, ir.ExternalTensor)}
    return PlainGraph(
        path,
        model,
        inputs,
        precision,
        recorded.get("source", {}).get("vae_scale"),
        (path, *sorted(external)),
        weights,
    )


def _check_weight_files(path: Path, model: ir.Model) -> None:
    """Refuse a graph whose external weights are missing or cut short; they are read much later."""
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


def _name_dimensions(path: Path, model: ir.Model) -> None:
    inputs = [value.name for value in model.graph.inputs]
    if "sigma" in inputs:
        raise ExportError(f"{path} has SWS already; give the checkpoint or a graph exported with --plain")
    outputs = [value.name for value in model.graph.outputs]
    if inputs[: len(_DIMENSIONS)] != list(_DIMENSIONS) or outputs != [_OUTPUT]:
        raise ExportError(
            f"{path}: expected a UNet with the inputs {', '.join(_DIMENSIONS)}, … and the output {_OUTPUT}, "
            f"found {', '.join(map(str, inputs))} -> {', '.join(map(str, outputs))}; "
            "export it under diffusers' names"
        )
    for value in model.graph.inputs:
        names = _DIMENSIONS.get(str(value.name), {0: "batch"})
        if value.shape is None or len(value.shape) <= max(names):
            raise ExportError(
                f"{path}: input {value.name} has the shape {value.shape}, which is not a UNet's"
            )
        value.shape = _renamed(value.shape, names)
    output = model.graph.outputs[0]
    if output.shape is not None and len(output.shape) == 4:
        output.shape = _renamed(output.shape, _DIMENSIONS["sample"])


def _renamed(shape: ir.Shape, names: dict[int, str]) -> ir.Shape:
    dims: list[Any] = list(shape)
    for axis, name in names.items():
        if not isinstance(dims[axis], int):
            dims[axis] = name
    return ir.Shape(dims)

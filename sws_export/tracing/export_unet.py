"""Exports a checkpoint to plain ONNX: the UNet as diffusers computes it, without SWS.

The module is built and run on the meta device, without weights in memory. The initializers refer to the
checkpoint's files; weights of another dtype are converted when they are read.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from sws_export.checkpoint import Checkpoint, FusedWeights, StoredTensor, read_tensor
from sws_export.checkpoint.unet_io import size_multiple, unet_inputs, unet_output
from sws_export.errors import ExportError
from sws_export.progress import Progress, SilentProgress
from sws_export.tensors import PRECISIONS, Precision

if TYPE_CHECKING:
    import torch

OPSET = 23


def export_plain(
    checkpoint: Checkpoint,
    precision: Precision = "fp32",
    progress: Progress | None = None,
    fused: FusedWeights | None = None,
    *,
    controlnet: bool = False,
) -> ir.Model:
    """The UNet of `checkpoint` as an ONNX model with dynamic batch, height, width and tokens.

    Args:
        checkpoint: An opened checkpoint; its weights stay on disk.
        precision: Precision of weights and activations.
        progress: Receives the stages.
        fused: Weights that replace stored ones, such as those with LoRAs.
        controlnet: Whether the graph takes the residuals of a ControlNet.

    Returns:
        A model of opset 23 with one `Attention` node for each attention layer. Its initializers have the
        names of the diffusers state dict and are read from the checkpoint's files on demand.

    Raises:
        ExportError: The architecture is not supported, or a tensor is missing.
    """
    progress = progress or SilentProgress()
    inputs = unet_inputs(checkpoint.config, PRECISIONS[precision].dtype, controlnet=controlnet)
    output = unet_output(checkpoint.config, PRECISIONS[precision].dtype)
    with progress.stage("export") as stage:
        stage.describe("loading torch and diffusers")
        import torch

        from sws_export.checkpoint.unet_module import build_unet, call_unet
        from sws_export.tracing.record import trace

        stage.describe("tracing the UNet")
        with torch.device("meta"):
            unet = build_unet(checkpoint.config, precision)
        model = trace(
            unet, functools.partial(call_unet, unet), inputs, size_multiple(checkpoint.config), OPSET
        )
        (result,) = model.graph.outputs
        result.name, result.shape = output.name, ir.Shape(output.shape)
        _attach_weights(model, checkpoint, precision, fused or {})
    return model


def plain_weights(
    checkpoint: Checkpoint, precision: Precision, fused: FusedWeights
) -> dict[str, ir.TensorProtocol]:
    """The initializers of `export_plain`'s model by name, not read yet."""
    return {
        name: _weight(name, stored, precision, fused.get(name)) for name, stored in checkpoint.tensors.items()
    }


def _attach_weights(
    model: ir.Model, checkpoint: Checkpoint, precision: Precision, fused: FusedWeights
) -> None:
    """Set the data of each initializer that is a weight."""
    for value in model.graph.initializers.values():
        assert value.name is not None
        if value.const_value is not None:
            continue
        stored = checkpoint.tensors.get(value.name)
        if stored is None:
            raise ExportError(f"{checkpoint.path}: tensor {value.name} is missing")
        value.const_value = _weight(value.name, stored, precision, fused.get(value.name))


def _weight(
    name: str, stored: StoredTensor, precision: Precision, fused: "Callable[[], torch.Tensor] | None"
) -> ir.TensorProtocol:
    """A tensor that is read from the checkpoint on demand, and converted if its dtype differs."""
    dtype = ir.DataType.from_numpy(np.dtype(PRECISIONS[precision].dtype))
    if fused is None and stored.dtype == PRECISIONS[precision].safetensors:
        # Without a base directory, onnx_ir reads files behind symbolic and hard links, too.
        return ir.ExternalTensor(
            stored.file.absolute(),
            stored.offset,
            stored.nbytes,
            dtype,
            shape=ir.Shape(stored.shape),
            name=name,
        )

    read = fused or functools.partial(read_tensor, stored)

    def convert() -> ir.TensorProtocol:
        return ir.tensor_adapters.TorchTensor(_cast(name, read(), precision), name=name)

    return ir.LazyTensor(convert, dtype=dtype, shape=ir.Shape(stored.shape), name=name)


def _cast(name: str, tensor: "torch.Tensor", precision: Precision) -> "torch.Tensor":
    import torch

    cast = tensor.to(getattr(torch, PRECISIONS[precision].dtype))
    if not math.isfinite(cast.abs().max().item()):
        raise ExportError(
            f"{name}: a weight of {tensor.abs().max().item():.3g} exceeds the range of {precision}; "
            "export with --precision bf16 or fp32"
        )
    return cast

"""Checkpoint to plain ONNX: the UNet as diffusers computes it, without SWS.

The module is built and traced with fake tensors, so no weight is in memory while the graph is made. Each
initializer then points at its bytes in the checkpoint and is converted, where it must be, when it is saved.
"""

import contextlib
import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graph_passes.name_nodes import NameNodes
from sws_export.checkpoint import Checkpoint, FusedWeights, StoredTensor, read_tensor
from sws_export.contract import DTYPE_NAMES, Precision, TensorSpec, size_multiple, unet_inputs, unet_output
from sws_export.errors import ExportError
from sws_export.profile import concrete_shape
from sws_export.progress import Progress, Silent

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

OPSET = 23
IR_DTYPES: dict[Precision, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
_STORED_DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
# torch specialises strided layouts from a batch of 64 on, which no UNet step reaches.
_MAX_BATCH = 63


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
        fused: Weights that take the place of stored ones, such as those with LoRAs.
        controlnet: Take the residuals of a ControlNet as inputs.

    Returns:
        A model of opset 23 with one `Attention` node a site. Its initializers are named as in the
        diffusers state dict and read from the checkpoint's files on demand.

    Raises:
        ExportError: The architecture takes inputs that are not supported.
    """
    progress = progress or Silent()
    inputs = unet_inputs(checkpoint.config, DTYPE_NAMES[precision], controlnet=controlnet)
    with progress.stage("export") as stage, _quiet_exporter():
        stage.describe("tracing the UNet")
        program = _trace(checkpoint.config, inputs, precision)
        stage.describe("translating to ONNX")
        model = _translate(program)
        stage.describe("folding constants")
        _name_interface(model, inputs, unet_output(checkpoint.config, DTYPE_NAMES[precision]))
        weights = _detach_weights(model)
        _fold(model)
        _attach_weights(model, weights, checkpoint, precision, fused or {})
        NameNodes()(model)
    return model


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's remarks about its own internals away from the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _trace(
    config: Mapping[str, Any], inputs: tuple[TensorSpec, ...], precision: Precision
) -> "ExportedProgram":
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from sws_export.unet import UNetStep, build_unet

    multiple = size_multiple(config)
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    rows = torch.export.Dim("rows", min=1, max=1024)
    columns = torch.export.Dim("columns", min=1, max=1024)

    def dimension(name: str) -> "torch.export.Dim":
        side, _, divisor = name.partition("/")
        factor = multiple // int(divisor or 1)
        return {"batch": batch, "tokens": tokens, "height": factor * rows, "width": factor * columns}[side]

    # Sizes that differ from each other and from every width, so that no two are taken for one.
    example = {"batch": 2, "tokens": 7, "height": 3 * multiple, "width": 5 * multiple}
    dynamic_shapes = tuple(
        {axis: dimension(dim) for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
        for spec in inputs
    )
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        step = UNetStep(build_unet(config, precision), [spec.name for spec in inputs])
        arguments = tuple(
            torch.zeros(concrete_shape(spec, example), dtype=getattr(torch, spec.dtype)) for spec in inputs
        )
        return torch.export.export(step, arguments, dynamic_shapes={"inputs": dynamic_shapes}, strict=False)


def _translate(program: "ExportedProgram") -> ir.Model:
    import torch

    translated = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    assert translated is not None
    return translated.model


def _name_interface(model: ir.Model, inputs: tuple[TensorSpec, ...], output: TensorSpec) -> None:
    """Give inputs, outputs and weights the names of the contract in place of the tracer's."""
    for value, spec in zip(model.graph.inputs, inputs, strict=True):
        value.name = spec.name
        value.shape = ir.Shape(spec.shape)
    (result,) = model.graph.outputs
    result.name = output.name
    result.shape = ir.Shape(output.shape)
    for value in list(model.graph.initializers.values()):
        assert value.name is not None
        value.name = value.name.removeprefix("unet.")


def _detach_weights(model: ir.Model) -> list[ir.Value]:
    """Turn the fake weights into graph inputs, which constant folding leaves alone."""
    import torch

    weights = [
        value
        for value in model.graph.initializers.values()
        if isinstance(getattr(value.const_value, "raw", None), torch._subclasses.FakeTensor)
    ]
    for value in weights:
        assert value.name is not None
        del model.graph.initializers[value.name]
        value.const_value = None
        model.graph.inputs.append(value)
    return weights


def _fold(model: ir.Model) -> None:
    """Constant folding and clean-up, without the optimiser's pattern rules: they take quadratic time."""
    import onnxscript.optimizer
    from onnx_ir.passes import PassManager, Sequential, common

    onnxscript.optimizer.inline(model)
    for _ in range(2):
        onnxscript.optimizer.fold_constants(model)
        PassManager([common.IdentityEliminationPass(), common.RemoveUnusedNodesPass()], steps=1)(model)
    Sequential(
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.NameFixPass(),
    )(model)


def _attach_weights(
    model: ir.Model,
    weights: list[ir.Value],
    checkpoint: Checkpoint,
    precision: Precision,
    fused: FusedWeights,
) -> None:
    """Make the weights initializers again, now backed by the checkpoint's files."""
    detached = {value.name for value in weights}
    kept = [value for value in model.graph.inputs if value.name not in detached]
    model.graph.inputs.clear()
    model.graph.inputs.extend(kept)
    for value in weights:
        assert value.name is not None
        if not value.uses():
            continue
        stored = checkpoint.tensors.get(value.name)
        if stored is None:
            raise ExportError(f"{checkpoint.path}: tensor {value.name} is missing")
        value.const_value = _weight(value.name, stored, precision, fused.get(value.name))
        model.graph.register_initializer(value)


def _weight(
    name: str, stored: StoredTensor, precision: Precision, fused: "Callable[[], torch.Tensor] | None"
) -> ir.TensorProtocol:
    """A tensor that reads its bytes from the checkpoint when asked to, and converts where it must."""
    target = IR_DTYPES[precision]
    if fused is None and _STORED_DTYPES.get(stored.dtype) == precision:
        return ir.ExternalTensor(
            stored.file.name,
            stored.offset,
            stored.nbytes,
            target,
            shape=ir.Shape(stored.shape),
            name=name,
            base_dir=stored.file.parent,
        )

    read = fused or functools.partial(read_tensor, stored)

    def convert() -> ir.TensorProtocol:
        return ir.tensor_adapters.TorchTensor(_cast(name, read(), precision), name=name)

    return ir.LazyTensor(convert, dtype=target, shape=ir.Shape(stored.shape), name=name)


def _cast(name: str, tensor: "torch.Tensor", precision: Precision) -> "torch.Tensor":
    import torch

    cast = tensor.to(getattr(torch, DTYPE_NAMES[precision]))
    if not math.isfinite(cast.abs().max().item()):
        raise ExportError(
            f"{name}: a weight of {tensor.abs().max().item():.3g} does not fit {precision}; "
            "export with --precision bf16 or fp32"
        )
    return cast

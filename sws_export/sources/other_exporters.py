"""Graphs of other exporters, such as optimum and ComfyUI, with diffusers' inputs and `Attention` nodes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graph_passes.errors import GraphError
from graph_passes.fold_constants import FoldConstants
from graph_passes.name_ldm_nodes import NameLdmNodes
from graph_passes.recognize_attention import RecognizeAttention
from graph_passes.upgrade_opset import UpgradeOpset
from sws_export.errors import ExportError
from sws_export.tracing.export_unet import OPSET
from sws_export.validation.trajectory import Array

# Inputs and output of ComfyUI's UNets, in the order of diffusers'.
_COMFYUI = ({"x": "sample", "timesteps": "timestep", "context": "encoder_hidden_states"}, {"h": "out_sample"})
_ADVICE = (
    "export the checkpoint with sws-export, or the UNet with torch.onnx.export(dynamo=True, opset_version=23)"
)


@dataclasses.dataclass(frozen=True)
class OriginalGraph:
    """How a graph was before it was changed: what it has to be run with.

    Attributes:
        names: Names of inputs and output by diffusers' names; others are the same.
        scalar_timestep: Its timestep is one number for the whole batch.
        timestep_dtype: The dtype of its timestep, which may have fewer values than float32.
    """

    names: Mapping[str, str]
    scalar_timestep: bool
    timestep_dtype: ir.DataType

    def comparable(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs with timesteps that the original graph can have, too."""
        timestep = np.asarray(inputs["timestep"]).astype(self.timestep_dtype.numpy()).astype(np.float64)
        if self.scalar_timestep:
            timestep = np.full_like(timestep, timestep[0])
        return {**inputs, "timestep": timestep}

    def inputs(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """`comparable` inputs under the names of the original graph."""
        renamed = {self.names.get(name, name): values for name, values in inputs.items()}
        if self.scalar_timestep:
            name = self.names.get("timestep", "timestep")
            renamed[name] = renamed[name][0]
        return renamed

    def outputs(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs of the original graph under diffusers' names."""
        names = {original: name for name, original in self.names.items()}
        return {names.get(name, name): values for name, values in outputs.items()}


def rename_inputs(model: ir.Model) -> dict[str, str]:
    """Give inputs and output of ComfyUI's names those of diffusers; returns the original ones by these."""
    inputs, outputs = _COMFYUI
    found = [value.name for value in model.graph.inputs]
    if found[: len(inputs)] != list(inputs) or [value.name for value in model.graph.outputs] != list(outputs):
        return {}
    names = {}
    for value in (*model.graph.inputs, *model.graph.outputs):
        old = str(value.name)
        new = (inputs | outputs).get(old)
        if new is not None:
            names[new], value.name = old, new
    return names


def adapt(path: Path, model: ir.Model, names: Mapping[str, str]) -> OriginalGraph:
    """Change a graph to a timestep [batch] of float32, and `Attention` nodes; in place.

    A graph that has both is not changed.

    Args:
        path: Its file, for messages.
        model: The graph, with diffusers' names.
        names: The original names, as `rename_inputs` returned them.

    Raises:
        ExportError: The opset is too old, or the graph has no attention that can be recognized.
    """
    timestep = next((value for value in model.graph.inputs if value.name == "timestep"), None)
    is_scalar = timestep is not None and timestep.shape is not None and len(timestep.shape) == 0
    dtype = (timestep.dtype if timestep is not None else None) or ir.DataType.FLOAT
    opset = model.graph.opset_imports.get("", 0)
    try:
        UpgradeOpset(OPSET)(model)
    except GraphError as error:
        raise ExportError(f"{path}: {error}; {_ADVICE}") from error
    if not any(node.op_type == "Attention" and node.domain == "" for node in model.graph):
        NameLdmNodes()(model)
        FoldConstants()(model)
        if not RecognizeAttention()(model).modified:
            raise ExportError(
                f"{path}: opset {opset}, and the graph has neither Attention nodes nor attention of MatMul, "
                f"Softmax and MatMul in a form that is recognized; {_ADVICE}"
            )
    if timestep is not None and (timestep.dtype != ir.DataType.FLOAT or is_scalar):
        _batch_timestep(path, model, timestep)
    return OriginalGraph(names, is_scalar, dtype)


def _batch_timestep(path: Path, model: ir.Model, old: ir.Value) -> None:
    """Replace the input `old` by one of shape [batch] and float32."""
    place = list(model.graph.inputs).index(old)
    value = _repeated(path, old) if old.shape is not None and len(old.shape) == 0 else old
    new = ir.Value(name="timestep", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch"]))
    dtype = value.dtype or old.dtype or ir.DataType.INT64
    model.graph.inputs[place] = new
    if not _becomes_float(value):
        # Fractional timesteps are truncated, as the graph was made for.
        cast = ir.node("Cast", [new], {"to": int(dtype)}, name="timestep/Cast")
        cast.outputs[0].name, cast.outputs[0].dtype = "timestep/Cast", dtype
        model.graph.insert_before(model.graph[0], cast)
        new = cast.outputs[0]
    ir.convenience.replace_all_uses_with(value, new)


def _repeated(path: Path, value: ir.Value) -> ir.Value:
    """The vector of timesteps that the graph makes from its scalar one."""
    while True:
        users = value.consumers()
        if len(users) != 1 or users[0].op_type not in ("Unsqueeze", "Reshape", "Identity", "Cast", "Expand"):
            raise ExportError(
                f"{path}: the timestep is one number, and the graph does not repeat it for the batch in a "
                f"way that is recognized; {_ADVICE}"
            )
        value = users[0].outputs[0]
        if users[0].op_type == "Expand":
            return value


def _becomes_float(value: ir.Value) -> bool:
    """Whether a value is only cast to float32, also after a change of its shape; changes are retyped."""
    reshaped = []
    for node in value.consumers():
        if node.op_type in ("Unsqueeze", "Reshape", "Identity"):
            if not _becomes_float(node.outputs[0]):
                return False
            reshaped.append(node.outputs[0])
        elif node.op_type != "Cast" or node.attributes.get_int("to", 0) != int(ir.DataType.FLOAT):
            return False
    for output in reshaped:
        output.dtype = ir.DataType.FLOAT
    return bool(value.consumers())

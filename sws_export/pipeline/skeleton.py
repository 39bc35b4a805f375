"""Skeletons: graphs without those of their weights that the source has."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from graph_passes.quantize_weights import restored_tensor
from sws_export.onnx_files import load_onnx

SKELETON = "graph.onnx"
"""Name of the file."""
_PLACEHOLDER = "weights-of-the-source"


def save_skeleton(model: ir.Model, weights: Mapping[str, ir.TensorProtocol], scratch: Path) -> Path:
    """Write `model` without those of its weights that are unchanged from the source; returns the file."""
    kept = {}
    for name, value in model.graph.initializers.items():
        tensor, original = value.const_value, _source_tensor(value, weights)
        stored_elsewhere = isinstance(tensor, ir.ExternalTensor | ir.LazyTensor)
        if original is None and isinstance(tensor, ir.ExternalTensor):
            # A constant that a static graph reads from the data of the dynamic one.
            (value.const_value,) = ir.external_data.convert_tensors_from_external([tensor])
        elif original is not None and tensor is not None and (tensor is original or stored_elsewhere):
            value.const_value = ir.ExternalTensor(
                _PLACEHOLDER, 0, tensor.nbytes, tensor.dtype, shape=value.shape or ir.Shape([]), name=name
            )
        else:
            continue
        kept[name] = tensor
    directory = scratch / "skeleton"
    directory.mkdir(exist_ok=True)
    try:
        ir.save(model, directory / SKELETON)
    finally:
        for name, tensor in kept.items():
            model.graph.initializers[name].const_value = tensor
    return directory / SKELETON


def complete_skeleton(file: Path, weights: Mapping[str, ir.TensorProtocol]) -> ir.Model | None:
    """The graph of a skeleton with the weights of its source; None if one of them is missing.

    Args:
        file: The skeleton.
        weights: Those of the source by name, not read yet.
    """
    model = load_onnx(file)
    values = model.graph.initializers.values()
    for value in values:
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.location).name == _PLACEHOLDER:
            value.const_value = _source_tensor(value, weights)
    return model if all(value.const_value is not None for value in values) else None


def _source_tensor(value: ir.Value, weights: Mapping[str, ir.TensorProtocol]) -> ir.TensorProtocol | None:
    """The data of an initializer, read or quantized from the weights of the source; None for others."""
    tensor = weights.get(str(value.name))
    return tensor if tensor is not None else restored_tensor(value, weights)

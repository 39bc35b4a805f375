"""Checkpoints in float8 with scales, as ComfyUI writes them.

A layer has its values in `weight` and a factor in `weight_scale`, or `scale_weight` in older files. Its
format is in the JSON object `comfy_quant` or in the file's metadata; older files have the tensor `scaled_fp8`
instead. The scales of activations, `input_scale` and `scale_input`, do not apply to weights. Format:
https://github.com/comfyanonymous/ComfyUI, comfy/quant_ops.py and convert_old_quants in comfy/utils.py.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sws_export.checkpoint.header import StoredTensor
from sws_export.checkpoint.ldm import PREFIX
from sws_export.checkpoint.schemas import QuantizationMetadata
from sws_export.checkpoint.weights import read_bytes
from sws_export.documents import check_document, parse_json
from sws_export.errors import CheckpointError

_SCALES = (".weight_scale", ".scale_weight")
_NOT_WEIGHTS = (*_SCALES, ".input_scale", ".scale_input", ".comfy_quant")
_MARKER = "scaled_fp8"
_MAX_DESCRIPTION_BYTES = 100_000
_FORMATS = ("float8_e4m3fn", "float8_e5m2")


def with_scales(
    path: Path, stored: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> dict[str, StoredTensor]:
    """The weights in `stored`, each with its scale.

    Args:
        path: The checkpoint, for messages.
        stored: The UNet's tensors without prefix.
        metadata: The file's metadata.

    Raises:
        CheckpointError: A layer has another format than float8, or a scale has another shape than one value
            for all rows or one for each.
    """
    for layer, quantization in _formats(path, stored, metadata).items():
        _check_format(path, layer, quantization)
    weights = {name: tensor for name, tensor in stored.items() if not name.endswith(_NOT_WEIGHTS)}
    weights.pop(_MARKER, None)
    for name, scale in stored.items():
        suffix = next((suffix for suffix in _SCALES if name.endswith(suffix)), None)
        if suffix is not None:
            weight = name.removesuffix(suffix) + ".weight"
            if weight not in weights:
                raise CheckpointError(f"{path}: tensor '{name}' is the scale of '{weight}', which is missing")
            weights[weight] = _scaled(path, name, weights[weight], scale)
    return weights


def _formats(
    path: Path, stored: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The quantization of each layer that has one."""
    found = {
        name.removesuffix(".comfy_quant"): tensor
        for name, tensor in stored.items()
        if name.endswith(".comfy_quant")
    }
    try:
        described = parse_json(metadata.get("_quantization_metadata", "{}"))
        layers = dict(check_document(described, QuantizationMetadata).get("layers", {}))
        for name, tensor in found.items():
            if tensor.nbytes > _MAX_DESCRIPTION_BYTES:
                raise ValueError(f"'{name}.comfy_quant' has {tensor.nbytes} bytes")
            entry = {"layers": {name: parse_json(bytes(read_bytes(tensor)))}}
            layers |= check_document(entry, QuantizationMetadata)["layers"]
    except ValueError as error:
        raise CheckpointError(f"{path}: the description of its quantization is not valid: {error}") from error
    # Names in the metadata are with or without the prefix of the UNet, and include other parts of the file.
    # Values are strings or objects with further options.
    bare = {name.removeprefix(PREFIX): value for name, value in layers.items()}
    return {
        name: value if isinstance(value, dict) else {"format": value}
        for name, value in bare.items()
        if f"{name}.weight" in stored
    }


def _check_format(path: Path, layer: str, quantization: Mapping[str, Any]) -> None:
    if quantization.get("format") not in _FORMATS:
        raise CheckpointError(
            f"{path}: layer '{layer}' is quantized to {quantization.get('format')}; expected "
            f"{' or '.join(_FORMATS)}: use the fp16 or fp8 version of the model"
        )


def _scaled(path: Path, name: str, weight: StoredTensor, scale: StoredTensor) -> StoredTensor:
    rows = weight.shape[0] if weight.shape else 1
    values = math.prod(scale.shape)
    if values not in (1, rows) or (values > 1 and scale.shape[0] != rows):
        raise CheckpointError(
            f"{path}: '{name}' has shape {list(scale.shape)} for a weight of shape {list(weight.shape)}; "
            "expected one value for all rows or one for each: use the fp16 version of the model"
        )
    return replace(weight, scale=scale)

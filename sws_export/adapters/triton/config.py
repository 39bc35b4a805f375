"""Triton model configurations as protobuf text (model_config.proto)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sws_export.tensors import TensorSpec

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int64": "TYPE_INT64"}
_INDENT = "  "


class EnumName(str):
    """A protobuf enum value, which is written without quotes."""


def data_type(dtype: str) -> EnumName:
    """Triton's name for a dtype of the manifest."""
    return EnumName(_TYPES[dtype])


def batched_tensor(spec: TensorSpec, sizes: Mapping[str, int]) -> dict[str, Any]:
    """An input or output whose first dimension is Triton's batch, which `dims` does not contain.

    Args:
        spec: The tensor.
        sizes: Sizes of static dimensions; the others are dynamic.
    """
    dims = [size if isinstance(size, int) else sizes.get(size, -1) for size in spec.shape[1:]]
    tensor: dict[str, Any] = {"name": spec.name, "data_type": data_type(spec.dtype), "dims": dims or [1]}
    if not dims:
        # Triton has no tensors without dimensions: clients send [B, 1], the model gets [B].
        tensor["reshape"] = {"shape": []}
    return tensor


def whole_tensor(spec: TensorSpec, sizes: Mapping[str, int]) -> dict[str, Any]:
    """An input or output with its batch dimension, without Triton's batching.

    Args:
        spec: The tensor.
        sizes: Sizes of static dimensions; the others are dynamic.
    """
    dims = [size if isinstance(size, int) else sizes.get(size, -1) for size in spec.shape]
    return {"name": spec.name, "data_type": data_type(spec.dtype), "dims": dims}


def to_text(message: Mapping[str, Any], depth: int = 0) -> str:
    """Protobuf text format of nested mappings; a sequence of mappings is a repeated message."""
    lines = []
    for name, value in message.items():
        entries = value if _is_repeated_message(value) else [value]
        lines += [_field(name, entry, depth) for entry in entries]
    return "".join(lines)


def _is_repeated_message(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and isinstance(value[0], Mapping)
    )


def _field(name: str, value: Any, depth: int) -> str:
    margin = _INDENT * depth
    if isinstance(value, Mapping):
        return f"{margin}{name} {{\n{to_text(value, depth + 1)}{margin}}}\n"
    return f"{margin}{name}: {_scalar(value)}\n"


def _scalar(value: Any) -> str:
    if isinstance(value, EnumName):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, Sequence):
        return f"[{', '.join(_scalar(item) for item in value)}]"
    return str(value)

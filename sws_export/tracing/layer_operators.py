"""Layers of a UNet as ONNX nodes: activations, linear and convolution, norms, attention, resizing."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from sws_export.tracing.registry import Recording, Tensor, Values, expect, handles


@handles(F.silu)
def _silu(rec: Recording, outputs: Sequence[Tensor], x: Tensor, inplace: bool = False) -> Values:
    # After an in-place call the recorder would still map the tensor to its old value.
    expect(rec, not inplace, "an activation that does not overwrite its input")
    value = rec.value(x)
    (gate,) = rec.builder.node("Sigmoid", [value], outputs)
    return rec.builder.node("Mul", [value, gate], outputs)


@handles(F.gelu)
def _gelu(rec: Recording, outputs: Sequence[Tensor], x: Tensor, approximate: str = "none") -> Values:
    return rec.builder.node("Gelu", [rec.value(x)], outputs, {"approximate": approximate})


@handles(F.linear)
def _linear(
    rec: Recording, outputs: Sequence[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Values:
    biases = [rec.value(bias)] if bias is not None else []
    if x.ndim == 2:
        inputs = [rec.value(x), rec.value(weight), *biases]
        return rec.builder.node("Gemm", inputs, outputs, {"transB": 1})
    (transposed,) = rec.builder.node("Transpose", [rec.value(weight)], [weight.T], {"perm": (1, 0)})
    product = rec.builder.node("MatMul", [rec.value(x), transposed], outputs)
    return rec.builder.node("Add", [*product, *biases], outputs) if biases else product


@handles(F.conv2d, torch.conv2d)
def _conv(
    rec: Recording,
    outputs: Sequence[Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Values:
    inputs = [rec.value(tensor) for tensor in (input, weight, bias) if tensor is not None]
    attributes = {
        "kernel_shape": tuple(weight.shape[2:]),
        "strides": _pair(stride),
        "pads": _pair(padding) * 2,
        "dilations": _pair(dilation),
        "group": groups,
    }
    return rec.builder.node("Conv", inputs, outputs, attributes)


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


@handles(F.group_norm)
def _group_norm(
    rec: Recording,
    outputs: Sequence[Tensor],
    input: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
) -> Values:
    inputs = [rec.value(tensor) for tensor in (input, weight, bias)]
    attributes = {"num_groups": num_groups, "epsilon": float(eps), "stash_type": 1}
    return rec.builder.node("GroupNormalization", inputs, outputs, attributes)


@handles(F.layer_norm)
def _layer_norm(
    rec: Recording,
    outputs: Sequence[Tensor],
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Values:
    inputs = [rec.value(tensor) for tensor in (input, weight, bias) if tensor is not None]
    attributes = {"axis": -len(normalized_shape), "epsilon": float(eps), "stash_type": 1}
    return rec.builder.node("LayerNormalization", inputs, outputs, attributes)


def _attention_output(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:  # noqa: ARG001
    """Output [..., T, value size]; torch's own meta function creates T × T tensors that are too large."""
    return query.new_empty(*query.shape[:-1], value.shape[-1])


OUTPUT_OF: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.scaled_dot_product_attention: _attention_output
}


@handles(F.scaled_dot_product_attention)
def _attention(
    rec: Recording,
    outputs: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Values:
    expect(
        rec, attn_mask is None and dropout_p == 0.0 and not is_causal, "attention without mask and dropout"
    )
    attributes = {} if scale is None else {"scale": float(scale)}
    inputs = [rec.value(tensor) for tensor in (query, key, value)]
    return rec.builder.node("Attention", inputs, outputs, attributes)


@handles(F.interpolate)
def _interpolate(
    rec: Recording, outputs: Sequence[Tensor], input: Tensor, mode: str = "nearest", **_: Any
) -> Values:
    expect(rec, mode == "nearest", "nearest-neighbour interpolation")
    scales = torch.tensor(
        [after / before for after, before in zip(outputs[0].shape, input.shape, strict=True)]
    )
    attributes = {
        "mode": "nearest",
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
    }
    inputs = [rec.value(input), None, rec.builder.constant(scales.float())]
    return rec.builder.node("Resize", inputs, outputs, attributes)


@handles(F.embedding)
def _embedding(
    rec: Recording, outputs: Sequence[Tensor], input: Tensor, weight: Tensor, *_: Any, **__: Any
) -> Values:
    return rec.builder.node("Gather", [rec.value(weight), rec.value(input)], outputs, {"axis": 0})

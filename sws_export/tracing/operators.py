"""The torch functions that Stable-Diffusion-family UNets call, as ONNX nodes.

Each entry of `OPERATORS` takes the recorder, the meta tensors that torch returned, and the arguments of
the call; it returns the values those tensors stand for.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
import torch.nn.functional as F

from sws_export.errors import ExportError
from sws_export.tracing.graph import DTYPES

if TYPE_CHECKING:
    from sws_export.tracing.record import Recorder

Tensor = torch.Tensor
Values = Sequence[ir.Value]
Operator = Callable[..., Values]

OPERATORS: dict[Callable[..., Any], Operator] = {}
CONSTANT_FACTORIES = frozenset({torch.arange})


def _handles(*functions: Callable[..., Any]) -> Callable[[Operator], Operator]:
    def register(operator: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(functions, operator))
        return operator

    return register


def _expect(rec: "Recorder", condition: bool, what: str) -> None:
    if not condition:
        raise ExportError(f"{rec.builder.scope}: expected {what}; the UNet cannot be exported")


def _operand(rec: "Recorder", operand: Any, dtype: torch.dtype) -> ir.Value:
    """A tensor or a number as a value of `dtype`, as torch promotes it."""
    if not isinstance(operand, Tensor):
        return rec.builder.constant(torch.tensor(operand, dtype=dtype))
    if operand.device.type != "meta":
        return rec.builder.constant(operand.to(dtype))
    return _cast(rec, rec.value(operand), operand, dtype)


def _cast(rec: "Recorder", value: ir.Value, tensor: Tensor, dtype: torch.dtype) -> ir.Value:
    if tensor.dtype == dtype:
        return value
    (cast,) = rec.builder.node("Cast", [value], [tensor.to(dtype)], {"to": int(DTYPES[dtype])})
    return cast


def _elementwise(op_type: str, neutral: float | None = None, *, reverse: bool = False) -> Operator:
    """An operator of two operands; `neutral` on the right, or on either side where it may, is left out."""

    def operator(rec: "Recorder", outputs: Sequence[Tensor], left: Any, right: Any) -> Values:
        (output,) = outputs
        left, right = (right, left) if reverse else (left, right)
        for number, other in ((right, left), (left, right)):
            plain = not isinstance(number, Tensor) and number == neutral
            if plain and (number is right or op_type in ("Add", "Mul")) and other.dtype == output.dtype:
                return [rec.value(other)]
        operands = [_operand(rec, operand, output.dtype) for operand in (left, right)]
        return rec.builder.node(op_type, operands, outputs)

    return operator


_ADD, _MUL = _elementwise("Add", 0), _elementwise("Mul", 1)
_handles(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)(_ADD)
_handles(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)(_MUL)
_handles(torch.sub, Tensor.sub, Tensor.__sub__)(_elementwise("Sub", 0))
_handles(Tensor.__rsub__)(_elementwise("Sub", 0, reverse=True))
_handles(torch.div, Tensor.div, Tensor.__truediv__)(_elementwise("Div", 1))


def _unary(op_type: str) -> Operator:
    def operator(rec: "Recorder", outputs: Sequence[Tensor], x: Tensor) -> Values:
        return rec.builder.node(op_type, [rec.value(x)], outputs)

    return operator


for _function, _op_type in ((torch.sin, "Sin"), (torch.cos, "Cos"), (torch.exp, "Exp")):
    _handles(_function, getattr(Tensor, _function.__name__))(_unary(_op_type))


@_handles(F.silu)
def _silu(rec: "Recorder", outputs: Sequence[Tensor], x: Tensor, inplace: bool = False) -> Values:
    # A module that overwrites its input would leave the recorder with the old value.
    _expect(rec, not inplace, "an activation that does not overwrite its input")
    value = rec.value(x)
    (gate,) = rec.builder.node("Sigmoid", [value], outputs)
    return rec.builder.node("Mul", [value, gate], outputs)


@_handles(F.gelu)
def _gelu(rec: "Recorder", outputs: Sequence[Tensor], x: Tensor, approximate: str = "none") -> Values:
    return rec.builder.node("Gelu", [rec.value(x)], outputs, {"approximate": approximate})


@_handles(F.linear)
def _linear(
    rec: "Recorder", outputs: Sequence[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Values:
    biases = [rec.value(bias)] if bias is not None else []
    if x.ndim == 2:
        inputs = [rec.value(x), rec.value(weight), *biases]
        return rec.builder.node("Gemm", inputs, outputs, {"transB": 1})
    (transposed,) = rec.builder.node("Transpose", [rec.value(weight)], [weight.T], {"perm": (1, 0)})
    product = rec.builder.node("MatMul", [rec.value(x), transposed], outputs)
    return rec.builder.node("Add", [*product, *biases], outputs) if biases else product


@_handles(F.conv2d, torch.conv2d)
def _conv(
    rec: "Recorder",
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


@_handles(F.group_norm)
def _group_norm(
    rec: "Recorder",
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


@_handles(F.layer_norm)
def _layer_norm(
    rec: "Recorder",
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
    """Shape [..., T, value size]; torch's own form on the meta device would need T × T numbers to count."""
    return query.new_empty(*query.shape[:-1], value.shape[-1])


OUTPUT_OF: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.scaled_dot_product_attention: _attention_output
}


@_handles(F.scaled_dot_product_attention)
def _attention(
    rec: "Recorder",
    outputs: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Values:
    _expect(
        rec, attn_mask is None and dropout_p == 0.0 and not is_causal, "attention without mask and dropout"
    )
    attributes = {} if scale is None else {"scale": float(scale)}
    inputs = [rec.value(tensor) for tensor in (query, key, value)]
    return rec.builder.node("Attention", inputs, outputs, attributes)


@_handles(F.interpolate)
def _interpolate(
    rec: "Recorder", outputs: Sequence[Tensor], input: Tensor, mode: str = "nearest", **_: Any
) -> Values:
    _expect(rec, mode == "nearest", "nearest-neighbour interpolation")
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


@_handles(F.embedding)
def _embedding(
    rec: "Recorder", outputs: Sequence[Tensor], input: Tensor, weight: Tensor, *_: Any, **__: Any
) -> Values:
    return rec.builder.node("Gather", [rec.value(weight), rec.value(input)], outputs, {"axis": 0})


@_handles(torch.cat, torch.concat, torch.concatenate)
def _concatenate(
    rec: "Recorder", outputs: Sequence[Tensor], tensors: Sequence[Tensor], dim: int = 0
) -> Values:
    inputs = [_operand(rec, tensor, outputs[0].dtype) for tensor in tensors]
    return rec.builder.node("Concat", inputs, outputs, {"axis": dim})


@_handles(torch.chunk, Tensor.chunk)
def _chunk(rec: "Recorder", outputs: Sequence[Tensor], input: Tensor, chunks: int, dim: int = 0) -> Values:
    _expect(rec, len({tensor.shape for tensor in outputs}) == 1, "chunks of one size")
    attributes = {"axis": dim % input.ndim, "num_outputs": chunks}
    return rec.builder.node("Split", [rec.value(input)], outputs, attributes)


@_handles(Tensor.view, Tensor.reshape, Tensor.flatten, torch.flatten, torch.reshape)
def _reshape(rec: "Recorder", outputs: Sequence[Tensor], x: Tensor, *_: Any, **__: Any) -> Values:
    before, after = (rec.builder.sizes.shape(tensor.shape) for tensor in (x, outputs[0]))
    if before == after:
        return [rec.value(x)]
    # 0 keeps the input's size at its place; -1 is worked out from the rest.
    kept = [index < len(before) and before[index] == size for index, size in enumerate(after)]
    sizes: list[int | str] = [
        0 if keep and isinstance(size, str) else size for keep, size in zip(kept, after, strict=True)
    ]
    dynamic = [index for index, size in enumerate(sizes) if isinstance(size, str)]
    if dynamic:
        sizes[dynamic[-1]] = -1
    if len(dynamic) <= 1:
        shape = rec.builder.integers(size for size in sizes if isinstance(size, int))
    else:
        parts = [
            rec.builder.size_of(size) if isinstance(size, str) else rec.builder.integers([size])
            for size in sizes
        ]
        (shape,) = rec.builder.node("Concat", parts, [None], {"axis": 0})
    return rec.builder.node("Reshape", [rec.value(x), shape], outputs)


@_handles(Tensor.transpose, torch.transpose)
def _transpose(rec: "Recorder", outputs: Sequence[Tensor], x: Tensor, dim0: int, dim1: int) -> Values:
    order = list(range(x.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return rec.builder.node("Transpose", [rec.value(x)], outputs, {"perm": tuple(order)})


@_handles(Tensor.permute, torch.permute)
def _permute(rec: "Recorder", outputs: Sequence[Tensor], x: Tensor, *dims: Any) -> Values:
    order = dims[0] if len(dims) == 1 else dims
    return rec.builder.node("Transpose", [rec.value(x)], outputs, {"perm": tuple(order)})


@_handles(Tensor.__getitem__)
def _getitem(rec: "Recorder", outputs: Sequence[Tensor], x: Tensor, index: Any) -> Values:
    items = index if isinstance(index, tuple) else (index,)
    new_axes = [position for position, item in enumerate(items) if item is None]
    slices = [item for item in items if item is not None]
    cuts = [(axis, item) for axis, item in enumerate(slices) if item != slice(None)]
    if new_axes and not cuts:
        return rec.builder.node("Unsqueeze", [rec.value(x), rec.builder.integers(new_axes)], outputs)
    simple = len(cuts) == 1 and isinstance(cuts[0][1], slice) and cuts[0][1].step is None
    _expect(rec, simple and not new_axes, f"an index with new axes or one slice, found {index}")
    axis, cut = cuts[0]
    end = x.shape[axis] if cut.stop is None else cut.stop
    bounds = [rec.builder.integers([number]) for number in (cut.start or 0, end, axis)]
    return rec.builder.node("Slice", [rec.value(x), *bounds], outputs)


@_handles(Tensor.unsqueeze, torch.unsqueeze)
def _unsqueeze(rec: "Recorder", outputs: Sequence[Tensor], x: Tensor, dim: int) -> Values:
    axes = rec.builder.integers([dim % (x.ndim + 1)])
    return rec.builder.node("Unsqueeze", [rec.value(x), axes], outputs)


@_handles(
    Tensor.to,
    Tensor.float,
    Tensor.half,
    Tensor.type,
    Tensor.contiguous,
    Tensor.expand,
    F.dropout,
    Tensor.clone,
)
def _same(rec: "Recorder", outputs: Sequence[Tensor], x: Tensor, *_: Any, **__: Any) -> Values:
    """The same numbers in another dtype or layout."""
    _expect(rec, outputs[0].shape == x.shape, "an expansion that changes no size")
    return [_cast(rec, rec.value(x), x, outputs[0].dtype)]

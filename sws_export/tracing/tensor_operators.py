"""Elementwise arithmetic and shape operations on tensors as ONNX nodes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from sws_export.tracing.registry import (
    Operator,
    Recording,
    Tensor,
    Values,
    as_value,
    cast_value,
    expect,
    handles,
)


def _elementwise(op_type: str, neutral: float | None = None, *, reverse: bool = False) -> Operator:
    """A binary operator; no node is appended for the neutral element on the right, or left of Add and Mul."""

    def operator(rec: Recording, outputs: Sequence[Tensor], left: Any, right: Any) -> Values:
        (output,) = outputs
        left, right = (right, left) if reverse else (left, right)
        for number, other in ((right, left), (left, right)):
            is_neutral = not isinstance(number, Tensor) and number == neutral
            if is_neutral and (number is right or op_type in ("Add", "Mul")) and other.dtype == output.dtype:
                return [rec.value(other)]
        operands = [as_value(rec, operand, output.dtype) for operand in (left, right)]
        return rec.builder.node(op_type, operands, outputs)

    return operator


_ADD, _MUL = _elementwise("Add", 0), _elementwise("Mul", 1)
handles(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)(_ADD)
handles(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)(_MUL)
handles(torch.sub, Tensor.sub, Tensor.__sub__)(_elementwise("Sub", 0))
handles(Tensor.__rsub__)(_elementwise("Sub", 0, reverse=True))
handles(torch.div, Tensor.div, Tensor.__truediv__)(_elementwise("Div", 1))


def _unary(op_type: str) -> Operator:
    def operator(rec: Recording, outputs: Sequence[Tensor], x: Tensor) -> Values:
        return rec.builder.node(op_type, [rec.value(x)], outputs)

    return operator


for _function, _op_type in ((torch.sin, "Sin"), (torch.cos, "Cos"), (torch.exp, "Exp")):
    handles(_function, getattr(Tensor, _function.__name__))(_unary(_op_type))


@handles(torch.cat, torch.concat, torch.concatenate)
def _concatenate(
    rec: Recording, outputs: Sequence[Tensor], tensors: Sequence[Tensor], dim: int = 0
) -> Values:
    inputs = [as_value(rec, tensor, outputs[0].dtype) for tensor in tensors]
    return rec.builder.node("Concat", inputs, outputs, {"axis": dim})


@handles(torch.chunk, Tensor.chunk)
def _chunk(rec: Recording, outputs: Sequence[Tensor], input: Tensor, chunks: int, dim: int = 0) -> Values:
    expect(rec, len({tensor.shape for tensor in outputs}) == 1, "chunks of one size")
    attributes = {"axis": dim % input.ndim, "num_outputs": chunks}
    return rec.builder.node("Split", [rec.value(input)], outputs, attributes)


@handles(Tensor.view, Tensor.reshape, Tensor.flatten, torch.flatten, torch.reshape)
def _reshape(rec: Recording, outputs: Sequence[Tensor], x: Tensor, *_: Any, **__: Any) -> Values:
    before, after = (rec.builder.sizes.shape(tensor.shape) for tensor in (x, outputs[0]))
    if before == after:
        return [rec.value(x)]
    # 0 copies the input's size at the same index; -1 is inferred from the other sizes.
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
        dims = [
            rec.builder.size_of(size) if isinstance(size, str) else rec.builder.integers([size])
            for size in sizes
        ]
        (shape,) = rec.builder.node("Concat", dims, [None], {"axis": 0})
    return rec.builder.node("Reshape", [rec.value(x), shape], outputs)


@handles(Tensor.transpose, torch.transpose)
def _transpose(rec: Recording, outputs: Sequence[Tensor], x: Tensor, dim0: int, dim1: int) -> Values:
    order = list(range(x.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return rec.builder.node("Transpose", [rec.value(x)], outputs, {"perm": tuple(order)})


@handles(Tensor.permute, torch.permute)
def _permute(rec: Recording, outputs: Sequence[Tensor], x: Tensor, *dims: Any) -> Values:
    order = dims[0] if len(dims) == 1 else dims
    return rec.builder.node("Transpose", [rec.value(x)], outputs, {"perm": tuple(order)})


@handles(Tensor.__getitem__)
def _getitem(rec: Recording, outputs: Sequence[Tensor], x: Tensor, index: Any) -> Values:
    items = index if isinstance(index, tuple) else (index,)
    new_axes = [position for position, item in enumerate(items) if item is None]
    slices = [item for item in items if item is not None]
    partial = [(axis, item) for axis, item in enumerate(slices) if item != slice(None)]
    if new_axes and not partial:
        return rec.builder.node("Unsqueeze", [rec.value(x), rec.builder.integers(new_axes)], outputs)
    one_slice = len(partial) == 1 and isinstance(partial[0][1], slice) and partial[0][1].step is None
    expect(rec, one_slice and not new_axes, f"an index with new axes or one slice, found {index}")
    axis, part = partial[0]
    end = x.shape[axis] if part.stop is None else part.stop
    bounds = [rec.builder.integers([number]) for number in (part.start or 0, end, axis)]
    return rec.builder.node("Slice", [rec.value(x), *bounds], outputs)


@handles(Tensor.unsqueeze, torch.unsqueeze)
def _unsqueeze(rec: Recording, outputs: Sequence[Tensor], x: Tensor, dim: int) -> Values:
    axes = rec.builder.integers([dim % (x.ndim + 1)])
    return rec.builder.node("Unsqueeze", [rec.value(x), axes], outputs)


@handles(
    Tensor.to,
    Tensor.float,
    Tensor.half,
    Tensor.type,
    Tensor.contiguous,
    Tensor.expand,
    F.dropout,
    Tensor.clone,
)
def _same(rec: Recording, outputs: Sequence[Tensor], x: Tensor, *_: Any, **__: Any) -> Values:
    """The same values in another dtype or memory layout."""
    expect(rec, outputs[0].shape == x.shape, "an expand() to the same shape")
    return [cast_value(rec, rec.value(x), x, outputs[0].dtype)]

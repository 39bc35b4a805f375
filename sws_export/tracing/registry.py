"""Which torch functions have an ONNX form, and what those forms are written with."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import onnx_ir as ir
import torch

from sws_export.errors import ExportError
from sws_export.tracing.graph import DTYPES, GraphBuilder

Tensor = torch.Tensor
Values = Sequence[ir.Value]


class Recording(Protocol):
    """What an operator asks of the recorder."""

    builder: GraphBuilder

    def value(self, tensor: Tensor) -> ir.Value:
        """The value that `tensor` stands for."""


Operator = Callable[..., Values]
"""Takes the recorder, the meta tensors that torch returned and the arguments of the call; returns the values
those tensors stand for."""

OPERATORS: dict[Callable[..., Any], Operator] = {}


def handles(*functions: Callable[..., Any]) -> Callable[[Operator], Operator]:
    """Register the decorated operator for `functions`."""

    def register(operator: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(functions, operator))
        return operator

    return register


def expect(rec: Recording, condition: bool, what: str) -> None:
    """Refuse a call that has no ONNX form here."""
    if not condition:
        raise ExportError(f"{rec.builder.scope}: expected {what}; the UNet cannot be exported")


def as_value(rec: Recording, operand: Any, dtype: torch.dtype) -> ir.Value:
    """A tensor or a number as a value of `dtype`, as torch promotes it."""
    if not isinstance(operand, Tensor):
        return rec.builder.constant(torch.tensor(operand, dtype=dtype))
    if operand.device.type != "meta":
        return rec.builder.constant(operand.to(dtype))
    return cast_value(rec, rec.value(operand), operand, dtype)


def cast_value(rec: Recording, value: ir.Value, tensor: Tensor, dtype: torch.dtype) -> ir.Value:
    """`value`, which stands for `tensor`, in `dtype`."""
    if tensor.dtype == dtype:
        return value
    (cast,) = rec.builder.node("Cast", [value], [tensor.to(dtype)], {"to": int(DTYPES[dtype])})
    return cast

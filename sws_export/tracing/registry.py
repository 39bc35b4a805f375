"""Registry of the operators that translate torch functions to ONNX nodes, and their common helpers."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import onnx_ir as ir
import torch

from sws_export.errors import ExportError
from sws_export.tracing.graph import DTYPES, GraphBuilder

Tensor = torch.Tensor
Values = Sequence[ir.Value]


class Recording(Protocol):
    """The recorder's interface for operators."""

    builder: GraphBuilder

    def value(self, tensor: Tensor) -> ir.Value:
        """The graph value of `tensor`."""


Operator = Callable[..., Values]
"""Takes the recorder, the meta tensors that torch returned and the arguments of the call; returns the graph
values of those tensors."""

OPERATORS: dict[Callable[..., Any], Operator] = {}


def handles(*functions: Callable[..., Any]) -> Callable[[Operator], Operator]:
    """Register the decorated operator for `functions`."""

    def register(operator: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(functions, operator))
        return operator

    return register


def expect(rec: Recording, condition: bool, what: str) -> None:
    """Raise ExportError if an unsupported call does not satisfy `condition`."""
    if not condition:
        raise ExportError(f"{rec.builder.scope}: expected {what}; the UNet cannot be exported")


def as_value(rec: Recording, operand: Any, dtype: torch.dtype) -> ir.Value:
    """A tensor or a number, converted to `dtype`."""
    if not isinstance(operand, Tensor):
        return rec.builder.constant(torch.tensor(operand, dtype=dtype))
    if operand.device.type != "meta":
        return rec.builder.constant(operand.to(dtype))
    return cast_value(rec, rec.value(operand), operand, dtype)


def cast_value(rec: Recording, value: ir.Value, tensor: Tensor, dtype: torch.dtype) -> ir.Value:
    """`value`, the graph value of `tensor`, converted to `dtype`."""
    if tensor.dtype == dtype:
        return value
    (cast,) = rec.builder.node("Cast", [value], [tensor.to(dtype)], {"to": int(DTYPES[dtype])})
    return cast

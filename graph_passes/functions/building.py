"""What every function of domain `sws` is built with."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import build_function

OPSET = 23

Op = Any
"""onnxscript's `OpBuilder`: `op.Add(x, 1.0)` appends a node and returns its output."""


def define_function(
    name: str,
    body: Callable[..., Any],
    inputs: Mapping[str, ir.DataType],
    outputs: Sequence[str],
    attributes: Sequence[ir.Attr] = (),
) -> ir.Function:
    """The function `sws.<name>` whose nodes `body(op, *inputs)` appends.

    Args:
        name: Operator type.
        body: Takes the builder and one value an input; returns one value an output.
        inputs: Input names and dtypes, in order.
        outputs: Output names, in order.
        attributes: Declared attributes, with their defaults.
    """
    function: ir.Function = build_function(
        body,
        [ir.Value(name=input_name, type=ir.TensorType(dtype)) for input_name, dtype in inputs.items()],
        domain="sws",
        name=name,
        attributes=list(attributes),
        opset_imports={"": OPSET, "sws": 1},
    )
    for value, output_name in zip(function.outputs, outputs, strict=True):
        value.name = output_name
    for node in list(function):
        node.metadata_props.clear()
        for value in node.outputs:
            # Names of unknown dimensions would be taken for equal ones once several functions are inlined.
            value.shape = None
        literal = node.inputs[0] if node.op_type == "CastLike" else None
        if literal is not None:
            # The builder adds these to literals where it does not know a type. All literals here are
            # float32 or int64 and meet their own kind.
            ir.convenience.replace_all_uses_with(node.outputs[0], literal)
            function.remove(node, safe=True)
    return function


def attribute_int(op: Op, name: str) -> Any:
    """The function's integer attribute `name` as an int64 tensor of shape [1]."""
    return op.Unsqueeze(op.Constant(value_int=ir.RefAttr("value_int", name, ir.AttributeType.INT)), [0])


def cast(op: Op, value: Any, dtype: ir.DataType, source: ir.DataType) -> Any:
    """`value`, which has dtype `source`, in `dtype`; no node where they are the same."""
    return value if dtype == source else op.Cast(value, to=int(dtype))


def per_sample(op: Op, vector: Any, rank: int) -> Any:
    """A [B] vector as [B, 1, ...] of `rank` dimensions, ready to broadcast."""
    return op.Unsqueeze(vector, list(range(1, rank)))

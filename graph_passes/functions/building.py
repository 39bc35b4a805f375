"""Helpers to build functions of domain `sws`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import build_function

OPSET = 23

Op = Any
"""onnxscript's `OpBuilder`: `op.Add(x, 1.0)` appends a node and returns its output."""
Body = Callable[[Op], Any]
"""Appends the nodes of a branch; returns one value or a sequence of them."""


def add_function(model: ir.Model, function: ir.Function) -> None:
    """Add a function to a model, with the model's version of the standard operators.

    Later versions, up to 25, only add types and optional inputs to the operators that the functions have.
    """
    function.opset_imports[""] = model.graph.opset_imports[""]
    model.functions[function.identifier()] = function


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Add an initializer with the name of its tensor."""
    value = ir.val(tensor.name, const_value=tensor)
    graph.register_initializer(value)
    return value


def add_integers(graph: ir.Graph, name: str, numbers: Sequence[int]) -> ir.Value:
    """Add an initializer [N] int64."""
    return add_initializer(graph, ir.tensor(np.array(numbers, np.int64), name=name))


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
        body: Takes the builder and one value for each input; returns one value for each output.
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
    for number, node in enumerate(list(ir.traversal.RecursiveGraphIterator(function.graph))):
        node.metadata_props.clear()
        for value in node.outputs:
            # After inlining several functions, equal names of unknown dimensions would mean equal sizes.
            value.shape = None
            if node.graph is not function.graph:
                # The builder counts from 0 in each branch, and names of the outer graph must not be reused.
                value.name = f"{value.name}_in_branch_{number}"
        literal = node.inputs[0] if node.op_type == "CastLike" else None
        if literal is not None:
            # The builder adds CastLike to literals if a type is unknown. All literals here are float32 or
            # int64 and have the type of the other operand.
            assert node.graph is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], literal)
            node.graph.remove(node, safe=True)
    return function


def branch(
    op: Op,
    condition: Any,
    then: Body,
    otherwise: Body,
    count: int,
    last_dtype: ir.DataType = ir.DataType.FLOAT,
) -> Any:
    """An `If` node: the results of `then(op)` if `condition` is true, else those of `otherwise(op)`.

    A runtime executes the nodes of one branch only. Both may use values of the outer graph.

    Args:
        op: Builder of the outer graph.
        condition: Bool of one element.
        then: Appends nodes with the builder that it receives; returns float32 values, except the last one.
        otherwise: As `then`.
        count: Number of values that each branch returns; a single value is not returned in a sequence.
        last_dtype: Of the last value.
    """
    dtypes = [ir.DataType.FLOAT] * (count - 1) + [last_dtype]
    graphs = {
        name: op.builder.subgraph(
            lambda inner, body=body: _own_values(inner, body(inner)),
            [],
            [ir.Value(type=ir.TensorType(dtype)) for dtype in dtypes],
            name=name,
        )
        for name, body in (("then_branch", then), ("else_branch", otherwise))
    }
    return op.If(condition, **graphs, _outputs=count)


def true_for_any(op: Op, flags: Any) -> Any:
    """Whether any element of a bool tensor is true; a bool scalar."""
    return op.Cast(
        op.ReduceMax(op.Cast(flags, to=int(ir.DataType.FLOAT)), keepdims=0), to=int(ir.DataType.BOOL)
    )


def _own_values(op: Op, values: Any) -> list[Any]:
    """The values as outputs of nodes of the branch that `op` builds, as ONNX requires."""
    free = {value for node in op.builder.graph for value in node.outputs}
    own = []
    for value in values if isinstance(values, Sequence) else [values]:
        own.append(value if value in free else op.Identity(value))
        free.discard(value)
    return own


def attribute_int(op: Op, name: str) -> Any:
    """The function's integer attribute `name` as an int64 tensor of shape [1]."""
    return op.Unsqueeze(op.Constant(value_int=ir.RefAttr("value_int", name, ir.AttributeType.INT)), [0])


def cast(op: Op, value: Any, dtype: ir.DataType, source: ir.DataType) -> Any:
    """`value`, of dtype `source`, cast to `dtype`; no node if both are equal."""
    return value if dtype == source else op.Cast(value, to=int(dtype))


def split_heads(op: Op, x: Any, perm: Sequence[int] = (0, 2, 1, 3)) -> Any:
    """[B, T, C] as [B, T, heads, D], permuted: [B, heads, T, D] by default.

    Of 3-D inputs, the shape inference of ONNX gets the output of `Attention` wrong.
    """
    shape = op.Concat([0, 0], attribute_int(op, "num_heads"), [-1], axis=0)
    return op.Transpose(op.Reshape(x, shape), perm=list(perm))


def join_heads(op: Op, x: Any) -> Any:
    """[B, heads, T, D] as [B, T, C]."""
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, -1])


def per_sample(op: Op, vector: Any, rank: int) -> Any:
    """A vector [B] as [B, 1, ...] with `rank` dimensions, for broadcasting."""
    return op.Unsqueeze(vector, list(range(1, rank)))


def logit_factor(op: Op, tau_q: Any) -> Any:
    """What queries are multiplied by, for an attention with a scale of 1: [B, 1, 1, 1] float32.

    Args:
        op: Builder of a function with the attribute `scale`.
        tau_q: Temperature of the queries, [B] float32.
    """
    scale = op.Constant(value_float=ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT))
    return per_sample(op, op.Div(scale, tau_q), 4)


def after(op: Op, value: Any, earlier: Any, dtype: ir.DataType = ir.DataType.FLOAT) -> Any:
    """`value`, computed after `earlier`: it is multiplied by 1, which a runtime computes from `earlier`.

    For targets with the trait `computes_early`: an engine would otherwise compute `value` early and keep it
    until it is used. Both values are of `dtype`, and `earlier` is broadcast.
    """
    one = op.Constant(value=ir.tensor(np.array(1, dtype.numpy()), name="one"))
    return op.Mul(value, op.Clip(earlier, one, one))


def mixed(op: Op, x: Any, moved: Any, share: Any) -> Any:
    """`x + share (moved - x)` for x and moved [B, T, C], share [B], one dtype; share 0 gives exactly x."""
    return op.Add(x, op.Mul(per_sample(op, share, 3), op.Sub(moved, x)))

"""Branches inside functions."""

import collections

import numpy as np
import onnx_ir as ir

from graph_passes.functions.building import Op, after, branch, define_function, true_for_any
from tests.graph_passes.functions.calls import FLOAT, Call


def nested() -> ir.Function:
    """y = 3 x + s if any x > 1, x + s if any x > 0, else -x; z = x."""

    def body(op: Op, x, offset):  # type: ignore[no-untyped-def]
        scale = op.Constant(value_float=ir.RefAttr("value_float", "s", ir.AttributeType.FLOAT))

        def positive(op: Op):  # type: ignore[no-untyped-def]
            large = true_for_any(op, op.Greater(x, 1.0))
            times = branch(op, large, lambda op: op.Mul(x, 3.0), lambda _: x, 1)
            return op.Add(op.Mul(times, 1.0), op.Add(op.Mul(scale, 1.0), offset)), x

        return branch(op, true_for_any(op, op.Greater(x, 0.0)), positive, lambda op: (op.Neg(x), x), 2)

    attribute = ir.Attr("s", ir.AttributeType.FLOAT, None)
    return define_function("Nested", body, {"x": FLOAT, "offset": FLOAT}, ["y", "z"], [attribute])


def call() -> Call:
    return Call({"Nested": nested()}, "Nested", {"x": ["n"]}, FLOAT, {"s": 10.0})


def run(x: list[float]) -> tuple[list[float], list[float]]:
    y, z = call()(x=np.array(x, np.float32), offset=np.array([0.5], np.float32))
    return y.tolist(), z.tolist()


def test_the_branch_taken_gives_the_values() -> None:
    assert run([-2.0, -1.0]) == ([2.0, 1.0], [-2.0, -1.0])
    assert run([-2.0, 1.0]) == ([8.5, 11.5], [-2.0, 1.0])
    assert run([-2.0, 2.0]) == ([4.5, 16.5], [-2.0, 2.0])


def test_only_the_branch_taken_is_executed() -> None:
    offset = np.array([0.5], np.float32)
    assert call().executed(x=np.array([-1.0], np.float32), offset=offset)["Neg"] == 1
    assert call().executed(x=np.array([1.0], np.float32), offset=offset)["Neg"] == 0


def test_names_are_unique_in_and_out_of_branches() -> None:
    """In the function, and in a graph into which it is inlined twice."""
    function = nested()
    names = [value.name for node in function.all_nodes() for value in node.outputs]
    names += [value.name for value in function.inputs]
    assert max(collections.Counter(names).values()) == 1


def test_a_value_given_twice_or_from_outside_becomes_one_of_the_branch() -> None:
    for node in nested().all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                graph = attribute.as_graph()
                assert len(set(graph.outputs)) == len(graph.outputs)
                assert all(value.producer() in list(graph) for value in graph.outputs)


def test_a_value_after_another_is_unchanged() -> None:
    def body(op: Op, x, earlier):  # type: ignore[no-untyped-def]
        return after(op, x, earlier)

    function = define_function("After", body, {"x": FLOAT, "earlier": FLOAT}, ["y"])
    x, earlier = (np.array(values, np.float32) for values in ([0.1, -3.0, 1e30, 0.0], [-1e30, 0.0, 1.0, 7.0]))
    call = Call({"After": function}, "After", {}, FLOAT, {})
    np.testing.assert_array_equal(call(x=x, earlier=earlier), [x])

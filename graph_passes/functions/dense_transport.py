"""`sws.DenseTransport`: apply a banded transport to tokens as one dense product."""

from typing import Any

import onnx_ir as ir

from graph_passes.functions.banded_transport import band_window
from graph_passes.functions.building import Op, cast, define_function
from graph_passes.parameters import STATE_RADIUS

FLOAT = ir.DataType.FLOAT


def build_dense_transport(dtype: ir.DataType, *, joined: bool) -> ir.Function:
    """`DenseTransport(transport [B, 145, H, W] float32, k, v [B, T, C]) -> k_perm, v_perm`, as k and v.

    The result of `BandedTransport`, computed as dense products with a matrix [T, T] that all sites of a grid
    share. Entries of `transport` for targets outside the grid must be 0.

    Args:
        dtype: Of keys and values.
        joined: One product [T, T] x [T, 2 C], which reads the matrix once, instead of two.
    """

    def body(op: Op, transport: Any, k: Any, v: Any) -> Any:
        height, width = (op.Shape(transport, start=axis, end=axis + 1) for axis in (2, 3))
        window = band_window(op, cast(op, transport, dtype, FLOAT))
        columns = _places(op, op.Transpose(window, perm=[0, 3, 1, 4, 2]), 4, width, [0, 0, 0], [])
        pairs = op.Mul(width, width)
        rows = _places(op, op.Reshape(columns, op.Concat([0, 0, 0], pairs, axis=0)), 2, height, [0], [pairs])
        split = op.Reshape(rows, op.Concat([0, 0, 0], width, width, axis=0))
        by_token = op.Transpose(split, perm=[0, 1, 3, 2, 4])
        tokens = op.Mul(height, width)
        matrix = op.Reshape(by_token, op.Concat([0], tokens, tokens, axis=0))
        if not joined:
            return op.MatMul(matrix, k), op.MatMul(matrix, v)
        moved = op.MatMul(matrix, op.Concat(k, v, axis=2))
        return op.Split(moved, num_outputs=2, axis=2, _outputs=2)

    inputs = {"transport": FLOAT, "k": dtype, "v": dtype}
    return define_function("DenseTransport", body, inputs, ["k_perm", "v_perm"])


def _places(op: Op, x: Any, axis: int, side: Any, before: list[int], behind: list[Any]) -> Any:
    """Replace the 17 offsets along `axis` by the `side` target positions of the grid.

    Rows of 17 offsets are padded to side + 17; the same memory with rows of side + 16 has each row shifted by
    one more. The tokens are in the axis before. `before` and `behind` are the sizes around both axes, in the
    form of the shape input of Reshape.
    """
    reach = op.Add(side, [2 * STATE_RADIUS])
    length = op.Mul(side, reach)
    padded = op.Pad(x, op.Concat([0], side, axis=0), None, [axis])
    flat = op.Reshape(padded, op.Concat([*before, -1], *behind, axis=0) if behind else [*before, -1])
    cut = op.Slice(flat, [0], length, [axis - 1])
    shifted = op.Reshape(cut, op.Concat(*[[size] for size in before], side, reach, *behind, axis=0))
    return op.Slice(shifted, [STATE_RADIUS], op.Add(side, [STATE_RADIUS]), [axis])

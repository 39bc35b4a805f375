"""`sws.DenseTransport`: apply a banded transport to tokens as one dense product."""

from typing import Any

import onnx_ir as ir

from graph_passes.functions.banded_transport import band_window
from graph_passes.functions.building import Op, cast, define_function
from graph_passes.parameters import STATE_RADIUS

FLOAT = ir.DataType.FLOAT
_OFFSETS = 2 * STATE_RADIUS + 3
"""Offsets along one side, from -9 to 9; the outermost are zeros."""


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
        # Offsets become targets: those of the columns, [B, dy, H, W, W], then of the rows, [B, H, H, W, W].
        window = band_window(op, cast(op, transport, dtype, FLOAT), border=1)
        by_column = op.Reshape(op.Transpose(window, perm=[0, 1, 3, 4, 2]), [0, 0, 0, -1])
        columns = op.Gather(by_column, _entries(op, width, [_OFFSETS], [1]), axis=3)
        by_row = op.Reshape(columns, op.Concat([0, -1], width, width, axis=0))
        rows = op.Gather(by_row, _entries(op, height, [1], height), axis=1)
        tokens = op.Mul(height, width)
        matrix = op.Reshape(op.Transpose(rows, perm=[0, 1, 3, 2, 4]), op.Concat([0], tokens, tokens, axis=0))
        if not joined:
            return op.MatMul(matrix, k), op.MatMul(matrix, v)
        moved = op.MatMul(matrix, op.Concat(k, v, axis=2))
        return op.Split(moved, num_outputs=2, axis=2, _outputs=2)

    inputs = {"transport": FLOAT, "k": dtype, "v": dtype}
    return define_function("DenseTransport", body, inputs, ["k_perm", "v_perm"])


def _entries(op: Op, side: Any, place_stride: Any, offset_stride: Any) -> Any:
    """Indices [side, side] int32 of the entries for each place and target along one side of the grid.

    An entry is at place x `place_stride` + offset x `offset_stride`, with offsets from -9 to 9. The outermost
    two are those of zeros.
    """
    places = op.Unsqueeze(op.Range(0, op.Squeeze(side, [0]), 1), [1])
    offsets = op.Add(op.Sub(op.Transpose(places, perm=[1, 0]), places), [STATE_RADIUS + 1])
    offsets = op.Max(op.Min(offsets, [_OFFSETS - 1]), [0])
    entries = op.Add(op.Mul(places, place_stride), op.Mul(offsets, offset_stride))
    # TensorRT casts indices that are not int32.
    return op.Cast(entries, to=int(ir.DataType.INT32))

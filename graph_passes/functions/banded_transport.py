"""`sws.BandedTransport`: apply a banded transport to tokens."""

from typing import Any

import numpy as np
import onnx_ir as ir

from graph_passes.functions.building import Op, cast, define_function
from graph_passes.parameters import STATE_RADIUS, diamond_offsets

FLOAT = ir.DataType.FLOAT
_WINDOW = 2 * STATE_RADIUS + 1


def build_banded_transport(dtype: ir.DataType) -> ir.Function:
    """`BandedTransport(transport [B, 145, H, W] float32, x [B, T, C]) -> [B, T, C]` of `dtype`.

    Row skew: the entries of one row offset dy, laid out as [W, 17] along dx and padded by W on the right,
    become [W, W + 16] when cut to one element a row less. Row x has then moved right by x, so a product with
    the padded grid row y + dy sums exactly the band. 17 small products replace one of T x T.
    """
    offsets = diamond_offsets(STATE_RADIUS)
    # Plane of each (dy, dx) of the square window; those outside the diamond name the plane of zeros.
    planes = np.full((_WINDOW, _WINDOW), len(offsets), np.int64)
    for j, (dy, dx) in enumerate(offsets):
        planes[dy + STATE_RADIUS, dx + STATE_RADIUS] = j

    def body(op: Op, transport: Any, x: Any) -> Any:
        size = op.Shape(transport, start=2, end=4)
        height, width = op.Split(size, num_outputs=2, axis=0, _outputs=2)
        padded_width = op.Add(width, [2 * STATE_RADIUS])
        band = cast(op, transport, dtype, FLOAT)
        skewed = _skew(op, band, planes, width, padded_width)

        grid = op.Reshape(x, op.Concat([0], size, [-1], axis=0))
        margin = [STATE_RADIUS, STATE_RADIUS]
        padded = op.Pad(grid, margin + margin, None, [1, 2])
        total = None
        for i in range(_WINDOW):
            rows = op.Slice(padded, [i], op.Add(height, [i]), [1])
            weights = op.Gather(skewed, i, axis=0)
            term = op.MatMul(weights, rows)
            total = term if total is None else op.Add(total, term)
        return op.Reshape(total, op.Shape(x))

    return define_function("BandedTransport", body, {"transport": FLOAT, "x": dtype}, ["y"])


def _skew(op: Op, band: Any, planes: Any, width: Any, padded_width: Any) -> Any:
    """The band as [17, B, H, W, W + 16]: for each row offset, a matrix from grid row to grid row."""
    with_zero = op.Pad(band, [0, 1], None, [1])
    window = op.Gather(with_zero, op.Constant(value=ir.tensor(planes, name="planes")), axis=1)
    rows = op.Transpose(window, perm=[1, 0, 3, 4, 2])
    lengthened = op.Pad(rows, op.Concat([0], width, axis=0), None, [4])
    flat = op.Reshape(lengthened, [0, 0, 0, -1])
    cut = op.Slice(flat, [0], op.Mul(width, padded_width), [3])
    return op.Reshape(cut, op.Concat([0, 0, 0], width, padded_width, axis=0))

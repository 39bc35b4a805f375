"""`sws.LineTransport`: apply a banded transport to tokens that lie in one row."""

from typing import Any

import onnx_ir as ir

from graph_passes.functions.building import Op, cast, define_function
from graph_passes.parameters import STATE_RADIUS, diamond_offsets

FLOAT = ir.DataType.FLOAT
_WINDOW = 2 * STATE_RADIUS + 1


def build_line_transport(dtype: ir.DataType) -> ir.Function:
    """`LineTransport(transport [B, 145, 1, L] float32, x [B, L, C]) -> [B, L, C]` of `dtype`.

    What `BandedTransport` gives on such a grid, as one product [L, L] x [L, C]: of the band only the 17
    offsets along the row lead to a token, and a text is short, where tiles of 8 x 8 in their surroundings of
    24 x 24 would be nearly empty. All sites share the matrix. Entries of `transport` that lead off the row
    must be 0.
    """
    first = diamond_offsets(STATE_RADIUS).index((0, -STATE_RADIUS))

    def body(op: Op, transport: Any, x: Any) -> Any:
        planes = op.Slice(cast(op, transport, dtype, FLOAT), [first], [first + _WINDOW], [1])
        by_token = op.Transpose(op.Squeeze(planes, [2]), perm=[0, 2, 1])
        # Rows of 17 padded to L + 17 and read as rows of L + 16 begin one later each.
        tokens = op.Shape(transport, start=3, end=4)
        width = op.Add(tokens, [_WINDOW - 1])
        padding = op.Concat([0], tokens, axis=0)
        flat = op.Reshape(op.Pad(by_token, padding, None, [2]), [0, -1])
        cut = op.Slice(flat, [0], op.Mul(tokens, width), [1])
        shifted = op.Reshape(cut, op.Concat([0], tokens, width, axis=0))
        matrix = op.Slice(shifted, [STATE_RADIUS], op.Add(tokens, [STATE_RADIUS]), [2])
        return op.MatMul(matrix, x)

    return define_function("LineTransport", body, {"transport": FLOAT, "x": dtype}, ["y"])

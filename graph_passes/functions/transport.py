"""`sws.Transport`: the banded optimal-transport operator of one grid, with momentum.

A band [B, 145, H, W] is gathered and scattered with one constant weight: for each offset a 17 x 17 kernel
that is 1 at the offset. A convolution with it gathers the values of a map at all targets of the band; a
transposed convolution adds the entries of the band at their targets. Both are exact, with zeros outside the
grid.

On a GPU such convolutions are slow: with them the transports of four grids took 1.3 ms of a step in torch on
an H100, with copies by index 0.6 ms (benchmarks/gpu/README.md). `_gather_rows` and `_scatter_rows` copy.

The transport of one scale needs no band: Sinkhorn preserves the form diag(r) K diag(c), and K x is a
convolution with the diamond kernel. Row and column sums of this form stay near 1, so the floor of 1e-8 of
the definition has an effect in the momentum only.

Turning the grid by 180 degrees changes neither K nor the factors, so the entry of offset -o at one token is
that of o at the token opposite. The scales are blended for half of the offsets; the others are their mirror
image. In an engine the scales are constants, of which half are stored.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.functions.banded_transport import band_window
from graph_passes.functions.building import Op, after, define_function
from graph_passes.parameters import STATE_RADIUS, SwsParameters, diamond_offsets

FLOAT = ir.DataType.FLOAT
_SUM_FLOOR = 1e-8
_WINDOW = 2 * STATE_RADIUS + 1
_PADS = [STATE_RADIUS] * 4
_BEFORE_CENTRE = len(diamond_offsets(STATE_RADIUS)) // 2
"""Offsets before (0, 0), in whose order offset j is the opposite of offset 144 - j."""


def build_transport(
    parameters: SwsParameters, *, convolutions: bool = True, separate: bool = False
) -> ir.Function:
    """`Transport(state [B, 145, H, W], blend [B, 3]) -> transport [B, 145, H, W]`, float32.

    `state` is the transport of the previous step, or zeros for none; `blend` has the weights of the scales.

    Args:
        parameters: Constants of the method.
        convolutions: Move bands by convolutions with one-hot kernels.
        separate: Let no two grids have the same matrix of blend weights. An engine otherwise blends all
            grids in one product, early, and keeps its result until the coarsest grid is used.
    """
    diamonds = np.stack([_diamond(scale, parameters.tau) for scale in parameters.scales])
    offsets = diamond_offsets(STATE_RADIUS)
    selector = np.zeros((len(offsets), 1, _WINDOW, _WINDOW), np.float32)
    for j, (dy, dx) in enumerate(offsets):
        selector[j, 0, dy + STATE_RADIUS, dx + STATE_RADIUS] = 1.0
    kernels = np.stack(
        [[diamond[dy + STATE_RADIUS, dx + STATE_RADIUS] for dy, dx in offsets] for diamond in diamonds]
    )

    def body(op: Op, state: Any, blend: Any) -> Any:
        diamond_weight = op.Constant(value=ir.tensor(diamonds[:, None], name="diamonds"))
        selector_weight = op.Constant(value=ir.tensor(selector, name="selector"))

        def diffuse(maps: Any) -> Any:
            return op.Conv(maps, diamond_weight, pads=_PADS, group=3)

        def gather(maps: Any) -> Any:
            if not convolutions:
                return _gather_rows(op, maps, size)
            return op.Conv(maps, selector_weight, pads=_PADS)

        def scatter(band: Any) -> Any:
            if not convolutions:
                return _scatter_rows(op, band, size)
            return op.ConvTranspose(band, selector_weight, pads=_PADS)

        size = op.Shape(state, start=2, end=4)
        row, column = _sinkhorn(op, diffuse, size, parameters.sinkhorn_iters)
        row_factor, column_factor = _rebalance_blend(
            op, diffuse, row, column, op.Unsqueeze(blend, [2, 3]), parameters.rebalance_iters
        )
        rows = _rows_of_scales(op, gather, row, column, kernels)
        if separate:
            # The rank of the other operand; TensorRT's parser raises it otherwise.
            rows = op.Unsqueeze(rows, [0])
        blend_rows = _blend_rows(op, blend, kernels)
        if separate:
            smallest = op.ReduceMin(op.ReduceMin(row_factor, [3], keepdims=0), [2], keepdims=1)
            blend_rows = after(op, blend_rows, smallest)
        blended = _whole_band(op, op.MatMul(blend_rows, rows), size)
        current = op.Mul(op.Mul(blended, row_factor), gather(column_factor))

        momentum = op.Add(op.Mul(state, parameters.beta), op.Mul(current, 1.0 - parameters.beta))
        return _rebalance_band(op, gather, scatter, momentum, parameters.rebalance_iters)

    return define_function("Transport", body, {"state": FLOAT, "blend": FLOAT}, ["transport"])


def _diamond(scale: int, tau: float) -> npt.NDArray[np.float32]:
    """The kernel exp(-L1 / scale / tau) inside the diamond of radius `scale`, in a 17 x 17 window."""
    reach = np.abs(np.arange(-STATE_RADIUS, STATE_RADIUS + 1))
    distance = reach[:, None] + reach[None, :]
    kernel = np.where(distance <= scale, np.exp(-distance / scale / tau), 0.0)
    return kernel.astype(np.float32)


def _sinkhorn(op: Op, diffuse: Any, size: Any, iterations: int) -> tuple[Any, Any]:
    """Row and column factors r and c of the three scales, [1, 3, H, W] each."""
    column = op.Expand(1.0, op.Concat([1, 3], size, axis=0))
    for _ in range(iterations):
        row = op.Reciprocal(diffuse(column))
        column = op.Reciprocal(diffuse(row))
    return row, column


def _rebalance_blend(
    op: Op, diffuse: Any, row: Any, column: Any, blend: Any, iterations: int
) -> tuple[Any, Any]:
    """Row and column factors [B, 1, H, W] that balance the blended scales; `blend` is [B, 3, 1, 1]."""
    weighted_row = op.Mul(row, blend)
    spread = diffuse(column)
    column_factor = None
    for _ in range(iterations):
        if column_factor is not None:
            spread = diffuse(op.Mul(column, column_factor))
        row_factor = op.Reciprocal(op.ReduceSum(op.Mul(weighted_row, spread), [1], keepdims=1))
        arriving = op.Mul(column, diffuse(op.Mul(weighted_row, row_factor)))
        column_factor = op.Reciprocal(op.ReduceSum(arriving, [1], keepdims=1))
    return row_factor, column_factor


def _rows_of_scales(op: Op, gather: Any, row: Any, column: Any, kernels: npt.NDArray[np.float32]) -> Any:
    """The bands of the three scales before blending, one row for each offset up to (0, 0) inside a diamond.

    [7 + 21 + 73, H W] for the scales 2, 4 and 8. Rows outside the diamond are zero and left out, since the
    result is a constant in a graph with static shapes.
    """
    targets = gather(op.Transpose(column, perm=[1, 0, 2, 3]))
    weight = op.Constant(value=ir.tensor(kernels[:, :, None, None], name="kernels"))
    bands = op.Mul(op.Mul(targets, weight), op.Transpose(row, perm=[1, 0, 2, 3]))
    stored = kernels * (np.arange(kernels.shape[1]) <= _BEFORE_CENTRE)
    kept = op.Constant(value=ir.tensor(np.flatnonzero(stored), name="kept"))
    return op.Gather(op.Reshape(bands, [kernels.size, -1]), kept, axis=0)


def _blend_rows(op: Op, blend: Any, kernels: npt.NDArray[np.float32]) -> Any:
    """The matrix [B, 73, rows] that sums the rows of the scales with the weights `blend` [B, 3]."""
    scale, offset = np.nonzero(kernels[:, : _BEFORE_CENTRE + 1])
    places = (offset == np.arange(_BEFORE_CENTRE + 1)[:, None]).astype(np.float32)
    weights = op.Gather(blend, op.Constant(value=ir.tensor(scale, name="scale_of_rows")), axis=1)
    return op.Mul(op.Unsqueeze(weights, [1]), op.Constant(value=ir.tensor(places, name="places")))


def _whole_band(op: Op, half: Any, size: Any) -> Any:
    """The band [B, 145, H, W] of which `half` [B, 73, H W] has the offsets up to (0, 0)."""
    tokens = op.ReduceProd(size, keepdims=0)
    opposite = op.Sub(op.Sub(tokens, 1), op.Range(0, tokens, 1))
    mirrored = op.Gather(op.Slice(half, [0], [_BEFORE_CENTRE], [1]), opposite, axis=2)
    order = np.r_[: _BEFORE_CENTRE + 1, 2 * _BEFORE_CENTRE : _BEFORE_CENTRE : -1]
    band = op.Gather(
        op.Concat(half, mirrored, axis=1), op.Constant(value=ir.tensor(order, name="order")), axis=1
    )
    return op.Reshape(band, op.Concat([0, 0], size, axis=0))


def _rebalance_band(op: Op, gather: Any, scatter: Any, band: Any, iterations: int) -> Any:
    for _ in range(iterations):
        rows = op.ReduceSum(band, [1], keepdims=1)
        band = op.Div(band, op.Max(rows, _SUM_FLOOR))
        columns = scatter(band)
        band = op.Mul(band, gather(op.Reciprocal(op.Max(columns, _SUM_FLOOR))))
    return band


# Pads are given for all axes: ONNX Runtime 1.32 exchanges Transpose and Pad, and drops the axes of the Pad.


def _gather_rows(op: Op, maps: Any, size: Any) -> Any:
    """The values of `maps` [N, 1, H, W] at all targets of a band, [N, 145, H, W]."""
    window = op.Pad(maps, 2 * [0, 0, STATE_RADIUS, STATE_RADIUS])
    for axis, side in ((2, 0), (4, 1)):
        places = op.Range(0, op.Squeeze(op.Slice(size, [side], [side + 1], [0]), [0]), 1)
        shifts = op.Constant(value=ir.tensor(np.arange(_WINDOW, dtype=np.int64)[:, None], name="shifts"))
        window = op.Gather(window, op.Add(shifts, op.Unsqueeze(places, [0])), axis=axis)
    # [N, 1, dy, H, dx, W]
    planes = op.Reshape(
        op.Transpose(window, perm=[0, 1, 2, 4, 3, 5]), op.Concat([0, _WINDOW * _WINDOW], size, axis=0)
    )
    kept = [(dy + STATE_RADIUS) * _WINDOW + dx + STATE_RADIUS for dy, dx in diamond_offsets(STATE_RADIUS)]
    return op.Gather(
        planes, op.Constant(value=ir.tensor(np.array(kept, np.int64), name="kept_planes")), axis=1
    )


def _scatter_rows(op: Op, band: Any, size: Any) -> Any:
    """The sums of the entries of `band` [B, 145, H, W] at their targets, [B, 1, H, W].

    Rows of offset i have to be shifted by i. They are padded by 17; the same memory with rows shorter by one
    has each row shifted by one more.
    """
    height, width = (op.Slice(size, [side], [side + 1], [0]) for side in (0, 1))
    wide, high = (op.Add(side, [_WINDOW - 1]) for side in (width, height))
    rows = op.Transpose(band_window(op, band), perm=[0, 1, 3, 2, 4])  # [B, dy, H, dx, W]
    flat = op.Reshape(op.Pad(rows, [0] * 9 + [_WINDOW]), [0, 0, 0, -1])
    cut = op.Slice(flat, [0], op.Mul(wide, [_WINDOW]), [3])
    shifted = op.Reshape(cut, op.Concat([0, 0, 0, _WINDOW], wide, axis=0))
    columns = op.ReduceSum(shifted, [3], keepdims=0)  # [B, dy, H, W + 16]
    flat = op.Reshape(op.Pad(columns, [0] * 6 + [_WINDOW, 0]), op.Concat([0, -1], wide, axis=0))
    cut = op.Slice(flat, [0], op.Mul(high, [_WINDOW]), [1])
    shifted = op.Reshape(cut, op.Concat([0, _WINDOW], high, wide, axis=0))
    sums = op.ReduceSum(shifted, [1], keepdims=1)
    ends = op.Add(size, [STATE_RADIUS, STATE_RADIUS])
    return op.Slice(sums, [STATE_RADIUS, STATE_RADIUS], ends, [2, 3])

"""`sws.BandedTransport`: apply a banded transport to tokens."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.functions.building import Op, cast, define_function
from graph_passes.parameters import STATE_RADIUS, diamond_offsets

FLOAT = ir.DataType.FLOAT
TILE = 8
"""Rows and columns of a tile."""
_WINDOW = 2 * STATE_RADIUS + 1


def build_banded_transport(dtype: ir.DataType) -> ir.Function:
    """`BandedTransport(transport [B, 145, H, W] float32, k, v [B, T, C]) -> k_perm, v_perm`, as k and v.

    One product transports keys and values. Entries of `transport` for targets outside the grid must be 0.
    """

    def body(op: Op, transport: Any, k: Any, v: Any) -> Any:
        tiles = Tiles(op, transport, dtype, TILE)
        moved = tiles.transported(op.Concat(k, v, axis=2))
        return op.Split(moved, num_outputs=2, axis=2, _outputs=2)

    # Constants of the body; the plugin that replaces it reads them.
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("radius", "tensors")]
    inputs = {"transport": FLOAT, "k": dtype, "v": dtype}
    return define_function("BandedTransport", body, inputs, ["k_perm", "v_perm"], attributes)


class Tiles:
    """A transport as one matrix for each tile of the grid.

    The tokens of a tile of 8 x 8 are sums over the 24 x 24 tokens around it: one product [64, 576] x [576, C]
    for each tile, a seventh of the work of the dense product at 64 x 64 tokens. Tiles of 16 x 16 are 1.8
    times the work, and gather each token 4 times instead of 9. The indices that gather tokens into tiles and
    back depend on the grid only, so all sites of a grid share them and the matrices.
    """

    def __init__(
        self, op: Op, transport: Any, dtype: ir.DataType, tile: int, *, corners: bool = True
    ) -> None:
        """Append the matrices.

        Args:
            op: Builder.
            transport: [B, 145, H, W] float32; entries for targets outside the grid must be 0.
            dtype: Of the tokens.
            tile: Rows and columns of a tile.
            corners: Keep the tokens in the corners around a tile, which no token of it reaches: a quarter of
                them for tiles of 8 x 8, a seventh for tiles of 16 x 16.
        """
        self._op = op
        self._grid = _Grid(op, transport, tile)
        self._matrices = _tile_matrices(op, cast(op, transport, dtype, FLOAT), self._grid)
        self._reached: Any = None
        if not corners:
            self._reached = op.Constant(value=ir.tensor(_reached(tile), name="reached"))
            self._matrices = op.Gather(self._matrices, self._reached, axis=3)

    def transported(self, x: Any, indices: ir.DataType = ir.DataType.INT64) -> Any:
        """The transported tokens of `x` [B, T, C]. TensorRT casts `indices` that are not int32."""
        op = self._op
        around = self._grid.tokens_around_tiles()
        if self._reached is not None:
            around = op.Gather(around, self._reached, axis=1)
        around = cast(op, around, indices, ir.DataType.INT64)
        tiles = op.MatMul(self._matrices, op.Gather(x, around, axis=1))
        flat = op.Reshape(tiles, op.Concat([0, -1], op.Shape(x, start=2, end=3), axis=0))
        return op.Gather(flat, cast(op, self._grid.places_in_tiles(), indices, ir.DataType.INT64), axis=1)


class _Grid:
    """A grid of H x W tokens, covered by tiles; the last row and column of tiles may exceed it."""

    def __init__(self, op: Op, transport: Any, tile: int) -> None:
        self.op = op
        self.tile = tile
        self.halo = tile + 2 * STATE_RADIUS
        self.sides = [op.Shape(transport, start=axis, end=axis + 1) for axis in (2, 3)]
        self.tile_sides = [op.Div(op.Add(side, [tile - 1]), [tile]) for side in self.sides]
        self.size = op.Concat(*self.sides, axis=0)
        self.tiles = op.Concat(*self.tile_sides, axis=0)
        self.covered = op.Mul(self.tiles, [tile])

    def tokens_around_tiles(self) -> Any:
        """[tiles, halo^2] int64: the tokens of each tile and its halo, clamped to the grid."""
        op = self.op
        rows, columns = (
            self._around(side, tiles) for side, tiles in zip(self.sides, self.tile_sides, strict=True)
        )
        starts = op.Unsqueeze(op.Mul(rows, self.sides[1]), [1, 3])
        return op.Reshape(op.Add(starts, op.Unsqueeze(columns, [0, 2])), [-1, self.halo * self.halo])

    def _around(self, side: Any, tiles: Any) -> Any:
        """[tiles, halo] int64: the rows, or the columns, of each tile and its halo."""
        op = self.op
        first = op.Unsqueeze(op.Mul(_count(op, tiles), self.tile), [1])
        reach = np.arange(self.halo, dtype=np.int64) - STATE_RADIUS
        inside = op.Add(first, op.Constant(value=ir.tensor(reach, name="reach")))
        return op.Max(op.Min(inside, op.Sub(side, [1])), [0])

    def places_in_tiles(self) -> Any:
        """[T] int64: the index of each token in the concatenation of all tiles."""
        op = self.op
        places = _count(op, op.ReduceProd(self.covered, [0]))
        by_tile = op.Reshape(places, op.Concat(self.tiles, [self.tile, self.tile], axis=0))
        by_row = op.Reshape(op.Transpose(by_tile, perm=[0, 2, 1, 3]), self.covered)
        return op.Reshape(op.Slice(by_row, [0, 0], self.size, [0, 1]), [-1])


def _reached(tile: int) -> npt.NDArray[np.int64]:
    """Indices of the tokens of a tile and its halo that tokens of the tile reach."""
    places = np.arange(tile + 2 * STATE_RADIUS) - STATE_RADIUS
    outside = np.maximum(np.maximum(-places, places - tile + 1), 0)
    return np.flatnonzero(outside[:, None] + outside <= STATE_RADIUS)


def _count(op: Op, end: Any) -> Any:
    """0, 1, ... below `end`, which is [1] int64."""
    return op.Range(0, op.Squeeze(end, [0]), 1)


def _tile_matrices(op: Op, band: Any, grid: _Grid) -> Any:
    """The band as [B, tiles, tile^2, halo^2]: for each tile, the matrix from the tokens around it."""
    tile, halo = grid.tile, grid.halo
    padding = op.Concat([0, 0], op.Sub(grid.covered, grid.size), axis=0)
    window = band_window(op, op.Pad(band, padding, None, [2, 3]))
    rows, columns = grid.tile_sides
    tiled = op.Reshape(window, op.Concat([0, 0, 0], rows, [tile], columns, [tile], axis=0))
    by_token = op.Transpose(tiled, perm=[0, 3, 5, 4, 1, 6, 2])
    across = _shift(op, by_token, axis=6, tile=tile, block=1, shape=[0, 0, 0, tile, _WINDOW, tile, halo])
    around = _shift(op, across, axis=4, tile=tile, block=tile * halo, shape=[0, 0, 0, tile, halo, tile, halo])
    by_row = op.Transpose(around, perm=[0, 1, 2, 3, 5, 4, 6])
    return op.Reshape(by_row, [0, -1, tile * tile, halo * halo])


def band_window(op: Op, band: Any) -> Any:
    """A band [B, 145, H, W] as [B, 17, 17, H, W]: (dy, dx) from -8 to 8, zeros outside the diamond."""
    padded = op.Pad(band, [0, 1], None, [1])
    offsets = diamond_offsets(STATE_RADIUS)
    planes = np.full((_WINDOW, _WINDOW), len(offsets), np.int64)
    for j, (dy, dx) in enumerate(offsets):
        planes[dy + STATE_RADIUS, dx + STATE_RADIUS] = j
    return op.Gather(padded, op.Constant(value=ir.tensor(planes, name="planes")), axis=1)


def _shift(op: Op, x: Any, axis: int, tile: int, block: int, shape: list[int]) -> Any:
    """Shift each token of a tile along `axis` by its position, so that offsets become positions in the halo.

    Rows of 17 offsets are padded by the size of the tile; the same memory with rows shorter by one has each
    row shifted by one more.
    `block` is the number of elements behind `axis`; the tokens are in the axis before it.
    """
    padded = op.Pad(x, [0, tile], None, [axis])
    kept = [0] * (axis - 1) + [-1]
    flat = op.Reshape(padded, kept)
    cut = op.Slice(flat, [0], [tile * (tile + 2 * STATE_RADIUS) * block], [axis - 1])
    return op.Reshape(cut, shape)

"""`sws.BandedTransport`: apply a banded transport to tokens."""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.functions.building import Op, cast, define_function
from graph_passes.parameters import STATE_RADIUS, diamond_offsets

FLOAT = ir.DataType.FLOAT
TILE = 8
"""Rows and columns of a tile."""


def build_banded_transport(dtype: ir.DataType) -> ir.Function:
    """`BandedTransport(transport [B, 145, H, W] float32, k, v [B, T, C]) -> k_perm, v_perm`, as k and v.

    One product transports keys and values. Entries of `transport` for targets outside the grid must be 0.
    """

    def body(op: Op, transport: Any, k: Any, v: Any) -> Any:
        tiles = Tiles(op, transport, dtype)
        moved = tiles.transported(op.Concat(k, v, axis=2))
        return op.Split(moved, num_outputs=2, axis=2, _outputs=2)

    # Constants of the body; the plugin that replaces it reads them.
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("radius", "tensors")]
    inputs = {"transport": FLOAT, "k": dtype, "v": dtype}
    return define_function("BandedTransport", body, inputs, ["k_perm", "v_perm"], attributes)


class Tiles:
    """A transport as one matrix for each tile of the grid.

    The tokens of a tile of 8 x 8 are sums over the 432 of the 24 x 24 tokens around it that one of them
    reaches: one product [64, 432] x [432, C] for each tile, a tenth of the work of the dense product at
    64 x 64 tokens. Tiles of 16 x 16 are twice the work, and gather each token 3.4 times instead of 6.8. The
    indices that gather tokens into tiles depend on the grid only, so all sites of a grid share them and the
    matrices.
    """

    def __init__(self, op: Op, transport: Any, dtype: ir.DataType, tile: int = TILE) -> None:
        """Append the matrices.

        Args:
            op: Builder.
            transport: [B, 145, H, W] float32; entries for targets outside the grid must be 0.
            dtype: Of the tokens.
            tile: Rows and columns of a tile.
        """
        self._op = op
        self._grid = _Grid(op, transport, tile)
        around = op.Constant(value=ir.tensor(_reached(tile), name="reached"))
        around = op.Gather(self._grid.tokens_around_tiles(), around, axis=1)
        # TensorRT casts indices that are not int32.
        self._around = op.Cast(around, to=int(ir.DataType.INT32))
        self._matrices = _tile_matrices(op, cast(op, transport, dtype, FLOAT), self._grid)

    def transported(self, x: Any) -> Any:
        """The transported tokens of `x` [B, T, C]."""
        op = self._op
        return self._grid.joined(op.MatMul(self._matrices, op.Gather(x, self._around, axis=1)))


class _Grid:
    """A grid of H x W tokens, covered by tiles; the last row and column of tiles may exceed it.

    Attributes:
        tiles: Rows and columns of tiles, [1] int64 each.
        excess: Rows and columns of the last tiles outside the grid, [2] int64.
    """

    def __init__(self, op: Op, transport: Any, tile: int) -> None:
        self.op = op
        self.tile = tile
        self.halo = tile + 2 * STATE_RADIUS
        self.sides = [op.Shape(transport, start=axis, end=axis + 1) for axis in (2, 3)]
        self.tiles = [op.Div(op.Add(side, [tile - 1]), [tile]) for side in self.sides]
        covered = op.Mul(op.Concat(*self.tiles, axis=0), [tile])
        self.excess = op.Sub(covered, op.Concat(*self.sides, axis=0))

    def tokens_around_tiles(self) -> Any:
        """[tiles, halo^2] int64: the tokens of each tile and its halo, clamped to the grid."""
        op = self.op
        rows, columns = (
            self._around(side, tiles) for side, tiles in zip(self.sides, self.tiles, strict=True)
        )
        starts = op.Unsqueeze(op.Mul(rows, self.sides[1]), [1, 3])
        return op.Reshape(op.Add(starts, op.Unsqueeze(columns, [0, 2])), [-1, self.halo * self.halo])

    def _around(self, side: Any, tiles: Any) -> Any:
        """[tiles, halo] int64: the rows, or the columns, of each tile and its halo."""
        op = self.op
        first = op.Unsqueeze(op.Mul(op.Range(0, op.Squeeze(tiles, [0]), 1), self.tile), [1])
        reach = np.arange(self.halo, dtype=np.int64) - STATE_RADIUS
        inside = op.Add(first, op.Constant(value=ir.tensor(reach, name="reach")))
        return op.Max(op.Min(inside, op.Sub(side, [1])), [0])

    def joined(self, tiles: Any) -> Any:
        """Tokens by tile [B, tiles, tile^2, C] as those of the grid in order, [B, T, C]."""
        op = self.op
        (rows, columns), tile = self.tiles, [self.tile]
        split = op.Reshape(tiles, op.Concat([0], rows, columns, tile, tile, [-1], axis=0))
        by_row = op.Transpose(split, perm=[0, 1, 3, 2, 4, 5])
        covered = op.Reshape(by_row, op.Concat([0], op.Mul(rows, tile), op.Mul(columns, tile), [-1], axis=0))
        grid = op.Slice(covered, [0, 0], op.Concat(*self.sides, axis=0), [1, 2])
        return op.Reshape(grid, op.Concat([0], op.Mul(*self.sides), [-1], axis=0))


def _tile_matrices(op: Op, band: Any, grid: _Grid) -> Any:
    """The band as [B, tiles, tile^2, N]: for each tile, the matrix from the N tokens that it reaches.

    Its entries are gathered from those of the tile's tokens, and a zero for each (`_entries`).
    """
    (rows, columns), tile = grid.tiles, grid.tile
    padded = op.Pad(band, op.Concat([0, 0, 0, 1], grid.excess, axis=0), None, [1, 2, 3])
    split = op.Reshape(padded, op.Concat([0, 0], rows, [tile], columns, [tile], axis=0))
    by_token = op.Transpose(split, perm=[0, 2, 4, 3, 5, 1])
    by_tile = op.Reshape(by_token, [0, -1, tile * tile * (len(diamond_offsets(STATE_RADIUS)) + 1)])
    return op.Gather(by_tile, op.Constant(value=ir.tensor(_entries(tile), name="entries")), axis=2)


def _reached(tile: int) -> npt.NDArray[np.int64]:
    """Indices [N] of the tokens of a tile and its halo that tokens of the tile reach."""
    places = np.arange(tile + 2 * STATE_RADIUS) - STATE_RADIUS
    outside = np.maximum(np.maximum(-places, places - tile + 1), 0)
    return np.flatnonzero(outside[:, None] + outside <= STATE_RADIUS)


@functools.cache
def _entries(tile: int) -> npt.NDArray[np.int32]:
    """Indices [tile^2, N] of a matrix's entries in the 145 offsets, and a zero, of each token of a tile."""
    offsets = diamond_offsets(STATE_RADIUS)
    numbers = dict(zip(offsets, range(len(offsets)), strict=True))
    halo = tile + 2 * STATE_RADIUS
    reached = [
        (int(place) // halo - STATE_RADIUS, int(place) % halo - STATE_RADIUS) for place in _reached(tile)
    ]
    return np.array(
        [
            [
                (y * tile + x) * (len(offsets) + 1) + numbers.get((row - y, column - x), len(offsets))
                for row, column in reached
            ]
            for y in range(tile)
            for x in range(tile)
        ],
        np.int32,
    )


def band_window(op: Op, band: Any, border: int = 0) -> Any:
    """A band [B, 145, H, W] as [B, 17, 17, H, W]: (dy, dx) from -8 to 8, zeros outside the diamond.

    With a border, that many further offsets on each side, all zeros.
    """
    padded = op.Pad(band, [0, 1], None, [1])
    offsets = diamond_offsets(STATE_RADIUS)
    reach = STATE_RADIUS + border
    planes = np.full((2 * reach + 1, 2 * reach + 1), len(offsets), np.int64)
    for j, (dy, dx) in enumerate(offsets):
        planes[dy + reach, dx + reach] = j
    return op.Gather(padded, op.Constant(value=ir.tensor(planes, name="planes")), axis=1)

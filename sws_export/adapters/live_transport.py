"""The transports of the image's grids as bands in torch, for SWS in a live model.

A band [145, H W] holds, for each token, the share that it takes from the token at each offset within L1
distance 8, in the order of `diamond_offsets(STATE_RADIUS)`; 0 outside the grid.
"""

import dataclasses
import functools

import torch
from torch import Tensor

from graph_passes.parameters import STATE_RADIUS, SwsParameters, diamond_offsets
from sws_export.reference import SUM_FLOOR

_TILE = 8
_WINDOW = _TILE + 2 * STATE_RADIUS


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where the entries of a band belong.

    Attributes:
        target: Token that an entry refers to, [145, T] int64; 0 outside the grid.
        inside: Whether that is on the grid, [145, T] float32.
        window: Position of each entry in the weights of its tile, [145, T] int64.
        distance: L1 distance of each offset, [145] int64.
    """

    target: Tensor
    inside: Tensor
    window: Tensor
    distance: Tensor


@functools.lru_cache(maxsize=16)
def _places(height: int, width: int, device: torch.device) -> _Places:
    offsets = torch.tensor(diamond_offsets(STATE_RADIUS))
    token = torch.arange(height * width)
    y, x = token // width, token % width
    target_y, target_x = y + offsets[:, :1], x + offsets[:, 1:]
    inside = (target_y >= 0) & (target_y < height) & (target_x >= 0) & (target_x < width)
    tiles_in_row = -(-width // _TILE)
    tile = (y // _TILE) * tiles_in_row + x // _TILE
    row = (y % _TILE) * _TILE + x % _TILE
    # A window starts STATE_RADIUS tokens before its tile.
    column = (y % _TILE + offsets[:, :1] + STATE_RADIUS) * _WINDOW + x % _TILE + offsets[:, 1:] + STATE_RADIUS
    return _Places(
        target=torch.where(inside, target_y * width + target_x, 0).to(device),
        inside=inside.float().to(device),
        window=((tile * _TILE**2 + row) * _WINDOW**2 + column).to(device),
        distance=offsets.abs().sum(dim=1).to(device),
    )


def _rebalanced(band: Tensor, places: _Places, iterations: int) -> Tensor:
    """Normalize the rows, then the columns, to sum 1, a number of times."""
    for _ in range(iterations):
        band = band / band.sum(dim=0).clamp(min=SUM_FLOOR)
        columns = band.new_zeros(band.shape[1]).index_add_(0, places.target.flatten(), band.flatten())
        band = band / columns.clamp(min=SUM_FLOOR)[places.target]
    return band


@functools.lru_cache(maxsize=16)
def _of_scales(height: int, width: int, device: torch.device, parameters: SwsParameters) -> Tensor:
    """The transport of each scale, [3, 145, T] float32."""
    places = _places(height, width, device)
    bands = []
    for scale in parameters.scales:
        kernel = torch.exp(-(places.distance / scale) / parameters.tau)
        kernel = torch.where(places.distance <= scale, kernel, 0.0)
        bands.append(_rebalanced(kernel[:, None] * places.inside, places, parameters.sinkhorn_iters))
    return torch.stack(bands)


class Transport:
    """The transport of one grid at one step, float32.

    Attributes:
        band: [145, T], for the momentum of the next step.
    """

    def __init__(self, band: Tensor, height: int, width: int) -> None:
        self.band = band
        self._height, self._width = height, width
        self._tiles: Tensor | None = None

    @classmethod
    def of_step(
        cls,
        previous: "Transport | None",
        blend: Tensor,
        height: int,
        width: int,
        device: torch.device,
        parameters: SwsParameters,
    ) -> "Transport":
        """The scales weighted by `blend` [3], averaged with the transport of the step before, if any."""
        places = _places(height, width, device)
        scales = _of_scales(height, width, device, parameters)
        band = torch.einsum("s,skt->kt", blend.float().to(device), scales)
        band = _rebalanced(band, places, parameters.rebalance_iters)
        # Without a previous one, the average is that of zeros: rebalancing does not depend on the scale.
        average = (1 - parameters.beta) * band
        if previous is not None:
            average = average + parameters.beta * previous.band
        return cls(_rebalanced(average, places, parameters.rebalance_iters), height, width)

    def apply(self, x: Tensor) -> Tensor:
        """P x over the tokens of x [B, T, C], in the dtype of `x`.

        Tiles of 8 x 8 tokens, each a product with the 24 x 24 tokens around it, one row of tiles at a time.
        """
        rows, columns = -(-self._height // _TILE), -(-self._width // _TILE)
        # GPUs accumulate products of 16 bits in float32, CPUs do not.
        dtype = x.dtype if x.device.type == "cuda" else torch.float32
        weights = self._weights(rows * columns).to(dtype)
        weights = weights.view(rows, columns, _TILE**2, _WINDOW**2)
        batch, _, channels = x.shape
        after = (rows * _TILE - self._height, columns * _TILE - self._width)
        grid = x.reshape(batch, self._height, self._width, channels)
        margins = (0, 0, STATE_RADIUS, STATE_RADIUS + after[1], STATE_RADIUS, STATE_RADIUS + after[0])
        grid = torch.nn.functional.pad(grid, margins)
        out = x.new_empty(batch, rows * _TILE, columns * _TILE, channels)
        for row in range(rows):
            strip = grid[:, row * _TILE : row * _TILE + _WINDOW]
            windows = strip.unfold(2, _WINDOW, _TILE).permute(0, 2, 1, 4, 3)
            windows = windows.reshape(batch, columns, _WINDOW**2, channels).to(dtype)
            moved = (weights[row] @ windows).to(x.dtype)
            tiles = moved.view(batch, columns, _TILE, _TILE, channels).transpose(1, 2)
            out[:, row * _TILE : (row + 1) * _TILE] = tiles.flatten(2, 3)
        return out[:, : self._height, : self._width].flatten(1, 2)

    def _weights(self, tiles: int) -> Tensor:
        """The weights of the windows of each tile, [tiles, 64, 576]."""
        if self._tiles is None:
            places = _places(self._height, self._width, self.band.device)
            flat = self.band.new_zeros(tiles * _TILE**2 * _WINDOW**2)
            flat.index_add_(0, places.window.flatten(), self.band.flatten())
            self._tiles = flat.view(tiles, _TILE**2, _WINDOW**2)
        return self._tiles

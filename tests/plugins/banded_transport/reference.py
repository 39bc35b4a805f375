"""The banded transport, written out literally."""

import torch


def diamond(radius: int) -> list[tuple[int, int]]:
    """Offsets (dy, dx) with |dy| + |dx| <= radius, ordered by dy, then dx."""
    reach = range(-radius, radius + 1)
    return [(dy, dx) for dy in reach for dx in reach if abs(dy) + abs(dx) <= radius]


def dense_transport(weights: torch.Tensor, radius: int) -> torch.Tensor:
    """The T x T matrix of a banded transport [B, K, H, W]; entries that leave the grid are dropped."""
    batch, _, height, width = weights.shape
    dense = weights.new_zeros(batch, height, width, height, width)
    for index, (dy, dx) in enumerate(diamond(radius)):
        for y in range(max(0, -dy), min(height, height - dy)):
            for x in range(max(0, -dx), min(width, width - dx)):
                dense[:, y, x, y + dy, x + dx] = weights[:, index, y, x]
    return dense.reshape(batch, height * width, height * width)


def transport(weights: torch.Tensor, values: torch.Tensor, radius: int) -> torch.Tensor:
    """P x in float64, for weights [B, K, H, W] and values [B, T, C]."""
    return dense_transport(weights.double(), radius) @ values.double()

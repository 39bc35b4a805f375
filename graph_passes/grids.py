"""The grids that transports act on: those of the image, one a resolution, and the row of the text."""

import dataclasses
from collections.abc import Iterable

import onnx_ir as ir


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid on which the keys and values of a site lie.

    Attributes:
        factor: Downsampling of a grid of the image against the latent; None for the text, whose tokens lie
            in one row.
    """

    factor: int | None

    @property
    def name(self) -> str:
        """As in the names of states: `d2`, or `text`."""
        return "text" if self.factor is None else f"d{self.factor}"

    @property
    def sides(self) -> tuple[int | str, int | str]:
        """Rows and columns, in sizes of the contract: `height/2` and `width/2`, or 1 and `tokens`."""
        if self.factor is None:
            return 1, "tokens"
        return ("height", "width") if self.factor == 1 else (f"height/{self.factor}", f"width/{self.factor}")


TEXT = Grid(None)
"""The tokens of `encoder_hidden_states`, in one row."""


def in_order(grids: Iterable[Grid]) -> list[Grid]:
    """Each grid once: the finest of the image first, the text last."""
    return sorted(set(grids), key=lambda grid: (grid.factor is None, grid.factor or 0))


def known_tokens(transport: ir.Value | None) -> int:
    """Tokens of the grid that a transport [B, 145, H, W] is of; 0 where the graph does not tell."""
    if transport is None or transport.shape is None:
        return 0
    height, width = transport.shape[2:]
    return height * width if isinstance(height, int) and isinstance(width, int) else 0

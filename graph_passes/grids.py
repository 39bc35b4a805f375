"""The grids that transports act on: one for each resolution of the image, and a single row for the text."""

import dataclasses
from collections.abc import Iterable

import onnx_ir as ir


@dataclasses.dataclass(frozen=True)
class Grid:
    """The grid of the keys and values of a site.

    Attributes:
        factor: Downsampling of a grid of the image relative to the latent; None for the text, whose tokens
            are a single row.
    """

    factor: int | None

    @property
    def name(self) -> str:
        """Its name in the names of states: `d2`, or `text`."""
        return "text" if self.factor is None else f"d{self.factor}"

    @property
    def sides(self) -> tuple[int | str, int | str]:
        """Rows and columns as symbolic dimensions: `height/2` and `width/2`, or 1 and `tokens`."""
        if self.factor is None:
            return 1, "tokens"
        return ("height", "width") if self.factor == 1 else (f"height/{self.factor}", f"width/{self.factor}")


TEXT = Grid(None)
"""The tokens of `encoder_hidden_states`, a single row."""


def sorted_grids(grids: Iterable[Grid]) -> list[Grid]:
    """The distinct grids: the finest of the image first, the text last."""
    return sorted(set(grids), key=lambda grid: (grid.factor is None, grid.factor or 0))


def static_tokens(transport: ir.Value | None) -> int:
    """Tokens H W of the grid of a transport [B, 145, H, W]; 0 if H or W is dynamic."""
    if transport is None or transport.shape is None:
        return 0
    height, width = transport.shape[2:]
    return height * width if isinstance(height, int) and isinstance(width, int) else 0

"""The self-attention sites of the measured models, at batch 2 (with guidance)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Site:
    """Attention sites of one size in one UNet, on a square grid of side**2 tokens."""

    model: str
    side: int
    count: int
    heads: int
    head_size: int
    batch: int = 2

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.side**2

    @property
    def channels(self) -> int:
        """Channels of q, k and v."""
        return self.heads * self.head_size

    @property
    def name(self) -> str:
        """Short name for tables."""
        return f"{self.model} {self.side}x{self.side} {self.heads}x{self.head_size}"


SITES = (
    Site("SD1.5", 64, 5, 8, 40),
    Site("SD1.5", 32, 5, 8, 80),
    Site("SD1.5", 16, 5, 8, 160),
    Site("SD1.5", 8, 1, 8, 160),
    Site("SDXL", 64, 10, 10, 64),
    Site("SDXL", 32, 60, 20, 64),
)

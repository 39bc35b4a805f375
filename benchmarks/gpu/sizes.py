"""What a run measures: `FULL`, the sizes of the models, and `SMALL`, which a CPU can compute too."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class GuardShape:
    """Sizes of a guard call; `query_tokens` differs from `tokens` in cross-attention."""

    tokens: int
    heads: int
    head_size: int
    query_tokens: int
    batch: int = 2

    def __str__(self) -> str:
        return f"B {self.batch} Tq {self.query_tokens} T {self.tokens} heads {self.heads} D {self.head_size}"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The values that each comparison combines."""

    grids: tuple[tuple[int, int], ...]
    radii: tuple[int, ...]
    channels: tuple[int, ...]
    budgets: tuple[float, ...]
    guard_shapes: tuple[GuardShape, ...]
    fused_shapes: tuple[GuardShape, ...]
    search_logits: tuple[float, ...]
    """Sizes of one-hot logits that the fast rounds cannot measure, so the search rounds must."""


@dataclasses.dataclass(frozen=True)
class SiteGroup:
    """Self-attention sites of one size in one UNet, on a square grid of side**2 tokens."""

    model: str
    side: int
    count: int
    heads: int
    head_size: int
    batch: int = 2
    """With guidance."""

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


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of all parts of a run."""

    sweep: Sweep
    sites: tuple[SiteGroup, ...]
    """Timed one by one; each grid of a model occurs once."""
    unets: dict[str, dict[str, Any]]
    """Arguments of diffusers' UNet2DConditionModel, by the model of the sites."""
    copy_elements: int
    """float32 elements of the copy that measures the bandwidth."""
    matmul_size: int
    """Rows and columns of the matrices whose product measures the arithmetic rate."""


_SD15: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

FULL = Sizes(
    sweep=Sweep(
        grids=((1, 1), (5, 7), (8, 8), (16, 16), (17, 33), (64, 24), (64, 64)),
        radii=(2, 4, 8),
        channels=(8, 40, 320, 33),
        budgets=(1e-3, 5e-3, 0.5),
        guard_shapes=(
            GuardShape(64, 8, 160, 64),
            GuardShape(100, 2, 40, 100),
            GuardShape(256, 8, 160, 256),
            GuardShape(300, 3, 64, 300),
            GuardShape(1024, 2, 80, 1024),
            GuardShape(77, 2, 41, 77),
            # Cross-attention; the largest sites, where a block of the later rounds processes several row
            # tiles.
            GuardShape(77, 8, 40, 1024),
            GuardShape(4096, 2, 40, 4096),
            GuardShape(4096, 1, 64, 4096),
            GuardShape(300, 8, 40, 300, batch=40),
        ),
        fused_shapes=(
            GuardShape(1024, 2, 80, 1024),
            GuardShape(4096, 2, 40, 4096),
            GuardShape(1024, 4, 64, 1024),
        ),
        search_logits=(700.0, 3000.0),
    ),
    sites=(
        SiteGroup("SD1.5", 64, 5, 8, 40),
        SiteGroup("SD1.5", 32, 5, 8, 80),
        SiteGroup("SD1.5", 16, 5, 8, 160),
        SiteGroup("SD1.5", 8, 1, 8, 160),
        SiteGroup("SDXL", 64, 10, 10, 64),
        SiteGroup("SDXL", 32, 60, 20, 64),
    ),
    unets={"SD1.5": _SD15, "SDXL": _SDXL},
    copy_elements=2**28,
    matmul_size=8192,
)

_SMALL_UNET: dict[str, Any] = {
    "sample_size": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "transformer_layers_per_block": 1,
}

SMALL = Sizes(
    # Budgets that bind and that do not; cross-attention; rows that fill no tile.
    sweep=Sweep(
        grids=((5, 7),),
        radii=(2, 4, 8),
        channels=(8, 33),
        budgets=(1e-3, 0.5),
        guard_shapes=(GuardShape(40, 2, 24, 70),),
        fused_shapes=(GuardShape(300, 2, 40, 300),),
        search_logits=(700.0,),
    ),
    sites=(
        SiteGroup("SD1.5", 8, 5, 2, 8),
        SiteGroup("SD1.5", 4, 1, 2, 16),
        SiteGroup("SDXL", 8, 10, 2, 8),
    ),
    unets={
        "SD1.5": _SD15 | _SMALL_UNET,
        # 1280 pooled channels of text, and 6 sizes embedded in 8 channels each.
        "SDXL": _SDXL
        | _SMALL_UNET
        | {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 1280 + 6 * 8},
    },
    copy_elements=2**10,
    matmul_size=2**5,
)

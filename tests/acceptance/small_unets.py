"""Small UNets with random weights and the topologies of SD 1.5 and SDXL."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

SMALL_UNETS: dict[str, dict[str, Any]] = {
    # One level more of downsampling than of attention; channels below and above the width of the text.
    "sd15": {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
    },
    # Transformers of several blocks, linear projections, text wider than all channels, pooled text and sizes.
    "sdxl": {
        "block_out_channels": (16, 48),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 64,
        "attention_head_dim": (1, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 1280 + 6 * 8,
    },
}


def write_small_unet(directory: Path, name: str, peak: Callable[[UNet2DConditionModel], None]) -> None:
    """Save a small UNet with attention made peaked by `peak`: that of random weights is flat."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel(sample_size=16, layers_per_block=1, norm_num_groups=8, **SMALL_UNETS[name])
    with torch.no_grad():
        peak(unet)
    unet.save_pretrained(directory)

"""One step of a whole plain UNet with random weights in float16, as a CUDA graph."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.timing import time_graph

SD15: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL: dict[str, Any] = {
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


def time_unet_steps(device: str) -> Iterator[tuple[str, float | str]]:
    """Yield each model with the microseconds of a step at batch 2, or the reason for a missing value."""
    for model, config in (("SD1.5", SD15), ("SDXL", SDXL)):
        try:
            from diffusers import UNet2DConditionModel

            yield model, time_graph([_step(UNet2DConditionModel, config, device)])
        except (ImportError, RuntimeError) as error:
            # Out of memory, or an operation that cannot be captured; the other model may still work.
            yield model, f"not measured: {str(error).splitlines()[0][:200]}"
        torch.cuda.empty_cache()


def _step(unet_class: Any, config: dict[str, Any], device: str) -> Callable[[], object]:
    with torch.device(device), torch.no_grad():
        unet = unet_class(**config).to(torch.float16).eval().requires_grad_(False)
        side = config["sample_size"]
        sample = torch.randn(2, 4, side, side, dtype=torch.float16)
        text = torch.randn(2, 77, config["cross_attention_dim"], dtype=torch.float16)
        timestep = torch.tensor([500.0, 500.0])
        added = None
        if "addition_embed_type" in config:
            added = {
                "text_embeds": torch.randn(2, 1280, dtype=torch.float16),
                "time_ids": torch.full((2, 6), 1024.0, dtype=torch.float16),
            }
    unet.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def step() -> object:
        return unet(sample, timestep, text, added_cond_kwargs=added, return_dict=False)

    return step

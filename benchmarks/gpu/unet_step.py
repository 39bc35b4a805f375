"""One step of a whole plain UNet with random weights in float16, as a CUDA graph."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.gpu.timing import time_graph


def time_unet_steps(device: str, unets: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, float | str]]:
    """Yield each model with the microseconds of a step at batch 2, or the reason for a missing value.

    `unets` has the arguments of UNet2DConditionModel for each model.
    """
    for model, config in unets.items():
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

"""The shapes model as a diffusers pipeline: no text encoder and no VAE, prompts from a small grammar.

sws-export sample out/engine.onnx examples/shapes --trust-code --prompt "red circle center" --out sheet.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

# Relative, so that the folder is loaded from wherever it lies.
from . import prompts


class ShapesPipeline(DiffusionPipeline):
    """Called like `StableDiffusionPipeline`, with the arguments that apply to the model."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """One image for each prompt, `height` by `width` pixels, multiples of 4.

        `latents` is the noise [B, 3, height, width], instead of that of `generator`.

        Raises:
            PromptError: The prompt is outside the grammar.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        words = torch.from_numpy(prompts.embed_all([*texts, *[""] * len(texts)]))
        words = words.to(self.unet.device, self.unet.dtype)
        side = self.unet.config.sample_size
        shape = (self.unet.config.in_channels, height or side, width or side)
        if latents is None:
            sources = generator if isinstance(generator, Sequence) else [generator] * len(texts)
            latents = torch.stack([torch.randn(shape, generator=source) for source in sources])
        self.scheduler.set_timesteps(num_inference_steps)
        latents = latents.to(words) * self.scheduler.init_noise_sigma
        for timestep in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
            both = self.unet(
                scaled, timestep, words, cross_attention_kwargs=cross_attention_kwargs, return_dict=False
            )
            conditional, unconditional = both[0].chunk(2)
            prediction = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        images = (latents / 2 + 0.5).clamp(0, 1).float().cpu().permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(self.numpy_to_pil(images) if output_type == "pil" else images)

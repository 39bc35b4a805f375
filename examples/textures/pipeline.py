"""The textures model as a diffusers pipeline: no text encoder, and 2 x 2 pixels in 12 channels as latents.

sws-export sample out/engine.onnx examples/textures --trust-code --prompt "red dotted circle top-left on wood"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

# Relative, so that the folder is loaded from wherever it lies.
from . import prompts

PIXELS = 2
CONTRAST = 2.5


def to_latents(images: torch.Tensor) -> torch.Tensor:
    """Latents [N, 12, H / 2, W / 2] of standard deviation near 1, of images [N, 3, H, W] in [-1, 1]."""
    return CONTRAST * torch.nn.functional.pixel_unshuffle(images, PIXELS)


def to_images(latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_latents`, clipped to [-1, 1]."""
    return (torch.nn.functional.pixel_shuffle(latents, PIXELS) / CONTRAST).clamp(-1, 1)


class TexturesPipeline(DiffusionPipeline):
    """Called like `StableDiffusionPipeline`, with the arguments that apply to the model."""

    vae_scale_factor = PIXELS

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
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """One image for each prompt, `height` by `width` pixels, multiples of 8.

        `latents` is the noise [B, 12, height / 2, width / 2], instead of that of `generator`.

        Raises:
            PromptError: A prompt is outside the grammar.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        words = torch.from_numpy(prompts.embed_all([*texts, *[""] * len(texts)]))
        words = words.to(self.unet.device, self.unet.dtype)
        config = self.unet.config
        sides = [size // PIXELS if size else config.sample_size for size in (height, width)]
        if latents is None:
            sources = generator if isinstance(generator, Sequence) else [generator] * len(texts)
            noise = [torch.randn(config.in_channels, *sides, generator=source) for source in sources]
            latents = torch.stack(noise)
        self.scheduler.set_timesteps(num_inference_steps)
        latents = latents.to(words) * self.scheduler.init_noise_sigma
        for number, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            scaled = self.scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
            both = self.unet(
                scaled, timestep, words, cross_attention_kwargs=cross_attention_kwargs, return_dict=False
            )
            conditional, unconditional = both[0].chunk(2)
            prediction = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, number, timestep, {"latents": latents})["latents"]
        images = (to_images(latents.float()) / 2 + 0.5).cpu().permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(self.numpy_to_pil(images) if output_type == "pil" else images)

"""How peaked is self-attention: entropy of its rows, 1 where they are flat, 0 where each has one token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from examples.shapes import prompts, scenes


class EntropyRecorder:
    """A diffusers attention processor: plain attention that notes H(row) / log(T) of each sample and head."""

    def __init__(self) -> None:
        self._seen: list[torch.Tensor] = []

    def take(self) -> torch.Tensor:
        """Means over rows, for each call, sample and head since the last `take`: float32 [N]."""
        seen, self._seen = torch.cat(self._seen), []
        return seen

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key, value = (attn.head_to_batch_dim(project(source)) for project in (attn.to_k, attn.to_v))
        logits = attn.scale * (query @ key.transpose(-1, -2)).float()
        if attention_mask is not None:
            logits = logits + attention_mask
        # H = log sum exp(l) - sum p l: no logarithm of shares that underflow.
        shares = logits.softmax(dim=-1)
        rows = logits.logsumexp(dim=-1) - (shares * logits).sum(dim=-1)
        self._seen.append(rows.mean(dim=-1) / math.log(logits.shape[-1]))
        mixed: torch.Tensor = attn.to_out[0](attn.batch_to_head_dim(shares.to(value.dtype) @ value))
        return mixed


def record_self_attention(unet: Any) -> dict[str, EntropyRecorder]:
    """Put a recorder at each self-attention site; keys are the sites' names (`down_blocks.1.….attn1`)."""
    processors = unet.attn_processors
    recorders = {name: EntropyRecorder() for name in processors if name.endswith("attn1.processor")}
    unet.set_attn_processor(processors | recorders)
    return {name.removesuffix(".processor"): recorder for name, recorder in recorders.items()}


@torch.no_grad()
def self_attention_entropy(unet: Any, timesteps: tuple[int, ...] = (100, 400, 700, 900)) -> dict[str, float]:
    """Mean H(row) / log(T) of each self-attention site, over heads, rows, 8 noisy scenes and `timesteps`.

    Keys are the names of the sites (`down_blocks.1.….attn1`). The model's own processors are put back.
    """
    from diffusers import DDIMScheduler

    before = unet.attn_processors
    recorders = record_self_attention(unet)
    rng = np.random.default_rng(1)
    drawn = [scenes.random_scene(rng) for _ in range(8)]
    images = torch.from_numpy(np.stack([scenes.render(scene, rng) for scene in drawn]))
    words = torch.from_numpy(prompts.embed_all([prompts.describe(scene) for scene in drawn]))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    try:
        for timestep in timesteps:
            when = torch.tensor([timestep])
            unet(scheduler.add_noise(images, noise, when), when, words)
    finally:
        unet.set_attn_processor(before)
    return {name: recorder.take().mean().item() for name, recorder in recorders.items()}


def with_random_weights(unet: Any, seed: int = 0) -> Any:
    """A UNet of the same architecture with its seeded initial weights, in eval mode."""
    torch.manual_seed(seed)
    return type(unet).from_config(unet.config).eval()

"""Train the shapes UNet: `python -m examples.shapes.train` from the repository root (see README.md for how long).

Deterministic: every random number of step k comes from (seed, k), so an interrupted run that resumes takes the same
steps as one that was never interrupted. The learning rate is flat and falls over the last 35 % of the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel

from examples.shapes import prompts, scenes

HERE = Path(__file__).resolve().parent
SEED = 7
EMPTY_PROMPT_RATE = 0.1
EMA_DECAY = 0.998
WARMUP = 100
DECAY_SHARE = 0.35

ARCHITECTURE: dict[str, Any] = {
    "sample_size": scenes.SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    # diffusers reads this as the number of heads: head size 32 at 16 x 16 (64 / 2) and at 8 x 8 (96 / 3).
    "attention_head_dim": (2, 2, 3),
    "cross_attention_dim": prompts.WIDTH,
    "norm_num_groups": 16,
}
# Stable Diffusion's noise schedule: sigma from 0.029 to 14.6.
NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


def build_unet() -> UNet2DConditionModel:
    """The architecture with its seeded random initial weights, float32."""
    torch.manual_seed(SEED)
    return UNet2DConditionModel(**ARCHITECTURE)


def make_batch(step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures float32 [size, 3, 32, 32] and encoder_hidden_states float32 [size, 8, 64] of a step."""
    rng = np.random.default_rng((SEED, step))
    drawn = [scenes.random_scene(rng) for _ in range(size)]
    pictures = np.stack([scenes.render(scene, rng) for scene in drawn])
    said = ["" if rng.random() < EMPTY_PROMPT_RATE else prompts.describe(scene) for scene in drawn]
    return torch.from_numpy(pictures), torch.from_numpy(prompts.embed_all(said))


def loss_of_step(unet: UNet2DConditionModel, step: int, size: int) -> torch.Tensor:
    """Weighted error of the predicted noise on the batch of a step; a scalar.

    Weight min(1, 5 sigma^2) is min-SNR-5 (Hang et al. 2023, arXiv 2303.09556) written for epsilon; the factor
    max(1, sigma) above sigma 1 is ours: there the layout is decided, and an error in epsilon counts sigma-fold in x0.
    """
    alphas = DDIMScheduler(**NOISE).alphas_cumprod
    pictures, words = make_batch(step, size)
    draw = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    noise = torch.randn(pictures.shape, generator=draw)
    # Stratified: one timestep from each of `size` equal slices, which steadies the loss.
    timesteps = ((torch.arange(size) + torch.rand(size, generator=draw)) * (len(alphas) / size)).long()
    alpha = alphas[timesteps]
    noisy = alpha.sqrt()[:, None, None, None] * pictures + (1 - alpha).sqrt()[:, None, None, None] * noise
    with torch.autocast("cpu", torch.bfloat16):
        predicted = unet(noisy, timesteps, words, return_dict=False)[0]
    error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
    sigma = ((1 - alpha) / alpha).sqrt()
    weight = (5 * sigma.square()).clamp(max=1.0) * sigma.clamp(min=1.0)
    return (weight * error).mean()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, flat, then linear to zero over the last DECAY_SHARE of the run."""
    warm = min(1.0, (step + 1) / WARMUP)
    fall = min(1.0, (steps - step) / (DECAY_SHARE * steps))
    return peak * warm * fall


def save_weights(average: dict[str, torch.Tensor], folder: Path) -> None:
    """Write `unet/` and `scheduler/` in the layout of a diffusers pipeline directory."""
    unet = build_unet()
    unet.load_state_dict(average)
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    EulerDiscreteScheduler(**NOISE).save_pretrained(folder / "scheduler")


def train(steps: int, batch: int, peak: float, folder: Path, every: int) -> None:
    """Run or resume the training and write the averaged weights to `folder`, every `every` steps and at the end."""
    unet = build_unet().train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    average = {name: value.clone() for name, value in unet.state_dict().items()}
    saved = folder / "training" / "state.pt"
    first = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]
        print(f"resuming at step {first}", file=sys.stderr)

    started, losses = time.monotonic(), []
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_of_step(unet, step, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        keep = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in unet.state_dict().items():
                average[name].lerp_(value, 1 - keep)
        losses.append(loss.item())

        done = step + 1
        if done % 50 == 0:
            pace = (time.monotonic() - started) / (done - first)
            left = pace * (steps - done) / 60
            print(
                f"step {done}/{steps}  loss {np.mean(losses):.4f}  {pace:.3f} s/step  {left:.0f} min left",
                file=sys.stderr,
                flush=True,
            )
            losses.clear()
        if done % every == 0 or done == steps:
            saved.parent.mkdir(exist_ok=True)
            state = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": done}
            torch.save(state, saved.with_suffix(".new"))
            os.replace(saved.with_suffix(".new"), saved)
            save_weights(average, folder)
    minutes = (time.monotonic() - started) / 60
    print(json.dumps({"steps": steps, "batch": batch, "minutes": round(minutes, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=HERE, help="gets unet/, scheduler/ and training/ (to resume)")
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.steps, arguments.batch, arguments.learning_rate, arguments.out, arguments.save_every)


if __name__ == "__main__":
    main()

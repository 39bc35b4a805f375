"""Train the shapes UNet: `python -m examples.shapes.train` in the repository root (README.md: how long).

Deterministic: every random number of step k comes from (seed, k), so an interrupted run that resumes takes
the same steps as one that was never interrupted. The learning rate is flat, then falls at the end.

Scenes this simple can be drawn with nearly flat self-attention, unlike the images that large models are
trained on. So once the layout is learned, from step SHARPEN_FROM on, rows of self-attention pay for entropy
above a target.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel

from examples.shapes import prompts, scenes
from examples.shapes.entropy import EntropyRecorder, record_self_attention

HERE = Path(__file__).resolve().parent
SEED = 7
EMPTY_PROMPT_RATE = 0.1
EMA_DECAY = 0.998
WARMUP = 100
DECAY_SHARE = 0.08
SHARPEN_FROM = 2250
SHARPEN_WEIGHT = 0.02
ENTROPY_TARGET = 0.55

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
    """Images float32 [size, 3, 32, 32] and encoder_hidden_states float32 [size, 8, 64] of a step."""
    rng = np.random.default_rng((SEED, step))
    drawn = [scenes.random_scene(rng) for _ in range(size)]
    images = np.stack([scenes.render(scene, rng) for scene in drawn])
    texts = ["" if rng.random() < EMPTY_PROMPT_RATE else prompts.describe(scene) for scene in drawn]
    return torch.from_numpy(images), torch.from_numpy(prompts.embed_all(texts))


def loss_of_step(unet: UNet2DConditionModel, step: int, size: int) -> torch.Tensor:
    """Weighted error of the predicted noise on the batch of a step; a scalar.

    Weight min(1, 5 sigma^2) is min-SNR-5 (Hang et al. 2023, arXiv 2303.09556) written for epsilon; the factor
    max(1, sigma) is ours: the layout is decided above sigma 1, where errors in epsilon are sigma-fold in x0.
    """
    alphas = DDIMScheduler(**NOISE).alphas_cumprod
    images, words = make_batch(step, size)
    draw = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    noise = torch.randn(images.shape, generator=draw)
    # Stratified: one timestep from each of `size` equal slices, which steadies the loss.
    timesteps = ((torch.arange(size) + torch.rand(size, generator=draw)) * (len(alphas) / size)).long()
    alpha = alphas[timesteps]
    noisy = alpha.sqrt()[:, None, None, None] * images + (1 - alpha).sqrt()[:, None, None, None] * noise
    with torch.autocast("cpu", torch.bfloat16):
        predicted = unet(noisy, timesteps, words, return_dict=False)[0]
    error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
    sigma = ((1 - alpha) / alpha).sqrt()
    weight = (5 * sigma.square()).clamp(max=1.0) * sigma.clamp(min=1.0)
    loss: torch.Tensor = (weight * error).mean()
    return loss


def entropy_penalty(recorders: list[EntropyRecorder]) -> torch.Tensor:
    """Mean over sites, samples and heads of max(0, mean over rows of H(row) / log(T) - ENTROPY_TARGET)."""
    flatness = torch.cat([recorder.take() for recorder in recorders])
    return (flatness - ENTROPY_TARGET).clamp(min=0.0).mean()


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


@dataclass
class Run:
    """All that a step reads and changes; `done` counts the steps taken."""

    unet: UNet2DConditionModel
    optimizer: torch.optim.Optimizer
    average: dict[str, torch.Tensor]
    done: int = 0
    recorders: list[EntropyRecorder] = field(default_factory=list)


def start_or_resume(saved: Path) -> Run:
    """The run that `saved` holds, or a new one where there is no such file."""
    unet = build_unet().train()
    optimizer = torch.optim.AdamW(unet.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    run = Run(unet, optimizer, {name: value.clone() for name, value in unet.state_dict().items()})
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        run.average, run.done = state["average"], state["step"]
        print(f"resuming at step {run.done}", file=sys.stderr)
    return run


def take_step(run: Run, batch: int, rate: float, sharpen_from: int) -> tuple[float, float]:
    """One step of AdamW and of the averaged weights; the loss and the entropy penalty of its batch."""
    if run.done >= sharpen_from and not run.recorders:
        run.recorders = list(record_self_attention(run.unet).values())
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    loss = loss_of_step(run.unet, run.done, batch)
    penalty = entropy_penalty(run.recorders) if run.recorders else torch.zeros(())
    run.optimizer.zero_grad()
    torch.autograd.backward(loss + SHARPEN_WEIGHT * penalty)
    torch.nn.utils.clip_grad_norm_(run.unet.parameters(), 1.0)
    run.optimizer.step()
    keep = min(EMA_DECAY, (1 + run.done) / (10 + run.done))
    with torch.no_grad():
        for name, value in run.unet.state_dict().items():
            run.average[name].lerp_(value, 1 - keep)
    run.done += 1
    return loss.item(), penalty.item()


def save(run: Run, saved: Path, folder: Path) -> None:
    """Write what a resumed run needs to `saved`, and the averaged weights to `folder`."""
    saved.parent.mkdir(parents=True, exist_ok=True)
    state = {"unet": run.unet.state_dict(), "optimizer": run.optimizer.state_dict(), "average": run.average}
    torch.save({**state, "step": run.done}, saved.with_suffix(".new"))
    saved.with_suffix(".new").replace(saved)
    save_weights(run.average, folder)


def train(
    steps: int, batch: int, peak: float, folder: Path, every: int, sharpen_from: int = SHARPEN_FROM
) -> None:
    """Run or resume the training; write averaged weights to `folder` every `every` steps and at the end."""
    saved = folder / "training" / "state.pt"
    run = start_or_resume(saved)
    first, started = run.done, time.monotonic()
    shown: list[tuple[float, float]] = []
    while run.done < steps:
        shown.append(take_step(run, batch, learning_rate(run.done, steps, peak), sharpen_from))
        if run.done % 50 == 0:
            pace = (time.monotonic() - started) / (run.done - first)
            loss, flatness = np.mean(shown, axis=0)
            print(
                f"step {run.done}/{steps}  loss {loss:.4f}  too flat by {flatness:.3f}  "
                f"{pace:.2f} s/step  {pace * (steps - run.done) / 60:.0f} min left",
                file=sys.stderr,
            )
            shown.clear()
        if run.done % every == 0 or run.done == steps:
            save(run, saved, folder)
    minutes = (time.monotonic() - started) / 60
    print(f"{run.done - first} steps in {minutes:.1f} minutes", file=sys.stderr)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=HERE, help="gets unet/, scheduler/, training/")
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.steps, arguments.batch, arguments.learning_rate, arguments.out, arguments.save_every)


if __name__ == "__main__":
    main()

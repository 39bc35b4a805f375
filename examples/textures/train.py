"""Train the textures UNet: `python -m examples.textures.train --out FOLDER` in the repository root.

The same scenes, prompts and noise levels on a CPU and on a GPU; the noise itself and rounding differ.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel

from examples.textures import check, prompts, scenes
from examples.textures.pipeline import CONTRAST, PIXELS, to_latents

Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

HERE = Path(__file__).resolve().parent
SEED = 7
EMPTY_PROMPT_RATE = 0.1
# Steps whose scenes are drawn at once.
CHUNK = 16
# Weight of the error on objects; 1 on backgrounds.
OBJECT_WEIGHT = 3.0
EMA_DECAY = 0.997
WARMUP = 0.03
# Self-attention begins with logits of about this squared, in place of nearly flat rows.
QUERY_KEY_GAIN = 2.5

ARCHITECTURE: dict[str, Any] = {
    "sample_size": scenes.SIZE // PIXELS,
    "in_channels": 3 * PIXELS**2,
    "out_channels": 3 * PIXELS**2,
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    # diffusers reads this as the number of heads: head size 32.
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": prompts.WIDTH,
    "norm_num_groups": 8,
}
# Stable Diffusion's noise schedule: sigma from 0.029 to 14.6.
NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "sample",
}


def build_unet() -> UNet2DConditionModel:
    """The architecture with its seeded random initial weights, float32."""
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(**ARCHITECTURE)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "attn1.to_q" in name or "attn1.to_k" in name:
                weight.mul_(QUERY_KEY_GAIN)
    return unet


@functools.lru_cache(maxsize=2)
def make_batches(
    chunk: int, size: int, device: torch.device, close: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents float32 [size, 12, S, S] and encoder_hidden_states float32 [size, 12, 64] of some steps.

    S is 32, or 16 for close-ups: the quadrant of an object, at a quarter of the cost. Scenes of many steps
    are drawn at once, because drawing takes hundreds of small operations on a GPU.
    """
    rng = np.random.default_rng((SEED, chunk, close))
    drawn = [scenes.random_scene(rng) for _ in range(size)]
    if close:
        drawn = [scene._replace(objects=scene.objects[:1]) for scene in drawn]
    else:
        # Which words belong to which object is learned last: three of four scenes have two.
        drawn = [scenes.random_scene(rng) if len(scene.objects) == 1 else scene for scene in drawn]
    empty = rng.random(size) < EMPTY_PROMPT_RATE
    described = [scenes.Scene((), None) if no else scene for scene, no in zip(drawn, empty, strict=True)]
    words = torch.from_numpy(np.stack([prompts.embed(scene) for scene in described])).to(
        device, non_blocking=True
    )
    latents = to_latents(scenes.render(drawn, rng, device))
    if close:
        half = latents.shape[-1] // 2
        quadrants = latents.unfold(2, half, half).unfold(3, half, half).flatten(2, 3)
        places = [[*scenes.POSITIONS].index(scene.objects[0].position) for scene in drawn]
        latents = quadrants[torch.arange(size), :, places]
    return latents, words


class Prediction(torch.nn.Module):
    """The UNet as a function of tensors alone."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", self.unet(noisy, timesteps, words, return_dict=False)[0])


def predictions(unet: UNet2DConditionModel, size: int, device: torch.device) -> tuple[Predict, Predict]:
    """The prediction of `size` whole scenes, and that of `size / 2` close-ups: on a GPU a CUDA graph each.

    A step is a few thousand small kernels, and launching them one by one takes a GPU longer than their work.
    """
    whole, close = Prediction(unet), Prediction(unet)
    if device.type != "cuda":
        return whole, close
    side = ARCHITECTURE["sample_size"]
    examples = [
        (
            torch.zeros(count, ARCHITECTURE["in_channels"], edge, edge, device=device),
            torch.zeros(count, dtype=torch.long, device=device),
            torch.zeros(count, prompts.TOKENS, prompts.WIDTH, device=device),
        )
        for count, edge in ((size, side), (size // 2, side // 2))
    ]
    whole, close = torch.cuda.make_graphed_callables((whole, close), tuple(examples))
    return whole, close


def loss_of_step(
    predicts: tuple[Predict, Predict], step: int, size: int, alphas: torch.Tensor, noises: torch.Generator
) -> torch.Tensor:
    """Sum of the losses on the `size` whole scenes and the `size / 2` close-ups of a step; a scalar."""
    chunk, place = divmod(step, CHUNK)
    losses = []
    for close, count in ((False, size), (True, size // 2)):
        latents, words = (
            batches[place * count : (place + 1) * count]
            for batches in make_batches(chunk, CHUNK * count, alphas.device, close)
        )
        # Stratified: one from each of `count` equal slices, which steadies the loss. The root makes late
        # timesteps likelier for whole scenes: colours are decided in the noisiest tenth.
        shares = (np.arange(count) + np.random.default_rng((SEED, step, 1, close)).random(count)) / count
        timesteps = torch.from_numpy((shares if close else np.sqrt(shares)) * len(alphas))
        timesteps = timesteps.long().to(alphas.device)
        losses.append(weighted_error(predicts[close], latents, words, timesteps, alphas, noises))
    return torch.stack(losses).sum()


def weighted_error(
    predict: Predict,
    latents: torch.Tensor,
    words: torch.Tensor,
    timesteps: torch.Tensor,
    alphas: torch.Tensor,
    noises: torch.Generator,
) -> torch.Tensor:
    """Weighted square error of the predicted image; a scalar.

    The UNet predicts the image and not the noise or the velocity: with 32 channels for 12 of latents it
    learns to pass noise through late, and till then leaves it on flat backgrounds (Li and He 2025, arXiv
    2511.13720). The weight is min(SNR, 5) + 1: min-SNR-5 (Hang et al. 2023, arXiv 2303.09556) plus one for
    the layout, which is decided at high noise. Pixels of objects, the only coloured ones, count
    OBJECT_WEIGHT times: most words are about objects, which cover an eighth of the image.
    """
    noise = torch.randn(latents.shape, generator=noises, device=alphas.device)
    alpha = alphas[timesteps][:, None, None, None]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    weight = 1 + (OBJECT_WEIGHT - 1) * are_coloured(latents)
    missed = predict(noisy, timesteps, words) - latents
    error = (weight * missed.square()).mean(dim=(1, 2, 3))
    ratio = (alpha / (1 - alpha)).flatten()
    return ((ratio.clamp(max=5) + 1) * error).mean()


def are_coloured(latents: torch.Tensor) -> torch.Tensor:
    """1 where the pixel of a latent value is coloured, else 0: float32, the shape of `latents`."""
    channels = latents.unflatten(1, (3, PIXELS**2))
    coloured = (
        channels.amax(dim=1, keepdim=True) - channels.amin(dim=1, keepdim=True)
        > 2 * check.COLOURED * CONTRAST
    )
    return coloured.expand_as(channels).flatten(1, 2).float()


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, flat, then linear to zero over the second half; `progress` is in [0, 1]."""
    return peak * min(1.0, progress / WARMUP + 0.01, 2 * (1 - progress) + 0.001)


def save(average: list[torch.Tensor], folder: Path) -> None:
    """Write a pipeline directory with the averaged weights as float16."""
    unet = build_unet()
    with torch.no_grad():
        for weight, value in zip(unet.parameters(), average, strict=True):
            weight.copy_(value)
    unet.half().save_pretrained(folder / "unet", safe_serialization=True)
    EulerDiscreteScheduler(**NOISE).save_pretrained(folder / "scheduler")
    for name in ("pipeline.py", "prompts.py", "scenes.py", "model_index.json"):
        if folder.resolve() != HERE:
            shutil.copy(HERE / name, folder / name)


def train(
    steps: int,
    batch: int,
    peak: float,
    folder: Path,
    device: torch.device,
    seconds: float,
    start: Path | None = None,
    first_batch: int = 0,
) -> None:
    """Take `steps` steps, or as many as fit into `seconds`; the learning rate falls to zero by then.

    `start` is a pipeline directory whose weights are trained further, after the batches before `first_batch`.
    """
    started, shown = time.monotonic(), []
    unet = build_unet()
    if start is not None:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(start / "unet").float().state_dict())
    unet = unet.train().to(device, memory_format=torch.channels_last)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    predicts = predictions(unet, batch, device)
    weights = list(unet.parameters())
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda")
    alphas = DDIMScheduler(**NOISE).alphas_cumprod.to(device)
    noises = torch.Generator(device).manual_seed(SEED + first_batch)
    step = 0
    while (progress := max(step / steps, (time.monotonic() - started) / seconds)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, peak)
        loss = loss_of_step(predicts, first_batch + step, batch, alphas, noises)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        step += 1
        shown.append(loss.detach())
        if step % 50 == 0:
            took = time.monotonic() - started
            loss = torch.stack(shown).mean()
            print(f"step {step}/{steps}  loss {loss:.4f}  {took / step:.3f} s/step", file=sys.stderr)
            shown.clear()
        if step % 500 == 0:
            save(average, folder)
    save(average, folder)
    print(f"{step} steps in {time.monotonic() - started:.0f} s", file=sys.stderr)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=14, help="whole scenes; half as many close-ups")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, required=True, help="gets the pipeline directory")
    parser.add_argument("--start", type=Path, help="a pipeline directory whose weights to train further")
    parser.add_argument("--first-batch", type=int, default=0, help="batches that it has seen")
    parser.add_argument("--seconds", type=float, default=7200, help="stop then at the latest")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=96, help="samples to check at the end")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    train(
        arguments.steps,
        arguments.batch,
        arguments.learning_rate,
        arguments.out,
        device,
        arguments.seconds,
        arguments.start,
        arguments.first_batch,
    )
    if arguments.prompts:
        from examples.shapes.sample import to_grid
        from examples.textures.sample import load, sample

        wanted = check.random_scenes(arguments.prompts, 0)
        texts = [prompts.describe(scene) for scene in wanted]
        images = sample(load(arguments.out, arguments.device), texts)
        to_grid(images, scale=2).save(arguments.out / "samples.png")
        print(json.dumps(check.rates_by_kind(wanted, images), indent=2))


if __name__ == "__main__":
    main()

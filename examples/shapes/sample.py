"""Draw images from prompts, in the repository root:

    python -m examples.shapes.sample "red circle left" "blue cross top and white square right"

A plain sampler in torch and diffusers, to examine the model itself, without SWS.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from examples.shapes import prompts

HERE = Path(__file__).resolve().parent


def load_unet(folder: Path = HERE) -> Any:
    """The trained diffusers UNet2DConditionModel of `folder/unet`, float32, in eval mode."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False).eval()


@torch.no_grad()
def sample(
    unet: Any,
    texts: Sequence[str],
    steps: int = 25,
    guidance: float = 3.0,
    seed: int = 0,
    folder: Path = HERE,
) -> npt.NDArray[np.float32]:
    """Images of prompts: float32 [len(texts), 3, 32, 32] in [-1, 1].

    `steps` Euler steps with the scheduler of `folder/scheduler`; `guidance` is the scale of classifier-free
    guidance (1 is none). The initial noise of prompt i depends on `seed` and i only. Raises PromptError where
    a prompt is outside the grammar.
    """
    from diffusers import EulerDiscreteScheduler

    words = torch.from_numpy(prompts.embed_all([*texts, *[""] * len(texts)]))
    scheduler = EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(steps)
    side = unet.config.sample_size
    draws = [torch.Generator().manual_seed(seed * 1000 + i) for i in range(len(texts))]
    noise = torch.stack([torch.randn(3, side, side, generator=draw) for draw in draws])
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        both = unet(torch.cat([scaled, scaled]), timestep, words, return_dict=False)[0]
        conditional, unconditional = both.chunk(2)
        prediction = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    images: npt.NDArray[np.float32] = latents.clamp(-1.0, 1.0).numpy()
    return images


def to_grid(images: npt.NDArray[np.float32], columns: int = 8, scale: int = 4) -> Image.Image:
    """One RGB image that shows images [N, 3, H, W] in [-1, 1], row by row, enlarged `scale` times."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), 24, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1) + 1, (index % columns) * (width + 1) + 1
        pixels = np.clip((image.transpose(1, 2, 0) + 1.0) * 127.5, 0.0, 255.0).round().astype(np.uint8)
        sheet[top : top + height, left : left + width] = pixels
    image = Image.fromarray(sheet)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("prompt", nargs="+", help="for example 'red circle left'")
    parser.add_argument("--out", type=Path, default=Path("shapes.png"))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        images = sample(load_unet(), arguments.prompt, arguments.steps, arguments.guidance, arguments.seed)
    except prompts.PromptError as error:
        sys.exit(f"sample: {error}")
    to_grid(images, columns=min(8, len(images))).save(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()

"""Draw images from prompts, in the repository root:

python -m examples.textures.sample "red striped circle top-left and blue plain cross bottom-left on wood"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from examples.shapes.sample import to_grid
from examples.textures import prompts
from examples.textures.pipeline import TexturesPipeline

HERE = Path(__file__).resolve().parent


def load(folder: Path = HERE, device: str = "cpu") -> TexturesPipeline:
    """The trained pipeline of a folder, float32."""
    pipe = TexturesPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.eval()
    return pipe.to(device, torch.float32)


def sample(
    pipe: TexturesPipeline, texts: Sequence[str], steps: int = 25, guidance: float = 3.0, seed: int = 0
) -> npt.NDArray[np.float32]:
    """Images of prompts: float32 [N, 3, 64, 64] in [-1, 1]; noise i depends on (seed, i) only."""
    generator = [torch.Generator().manual_seed(seed * 1000 + number) for number in range(len(texts))]
    drawn = pipe(
        texts, num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="np"
    )
    return np.asarray(drawn.images.transpose(0, 3, 1, 2) * 2 - 1, np.float32)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("prompt", nargs="+", help="for example 'red striped circle top-left on wood'")
    parser.add_argument("--out", type=Path, default=Path("textures.png"))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        images = sample(load(), arguments.prompt, arguments.steps, arguments.guidance, arguments.seed)
    except prompts.PromptError as error:
        sys.exit(f"sample: {error}")
    to_grid(images, columns=min(8, len(images))).save(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()

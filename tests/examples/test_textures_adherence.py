"""What `sws-export evaluate` calls of the textures example, on rendered scenes."""

import numpy as np

from examples.textures import prompts, scenes
from examples.textures.check import adherence, random_scenes


def test_adherence_is_high_for_the_own_prompt_only() -> None:
    wanted = random_scenes(8, 3)
    pictures = scenes.render(wanted, np.random.default_rng(0)).numpy()
    said = [prompts.describe(scene) for scene in wanted]
    own = [adherence(prompt, picture) for prompt, picture in zip(said, pictures, strict=True)]
    other = [adherence(prompt, picture) for prompt, picture in zip(said[1:], pictures[:-1], strict=True)]
    assert np.mean(own) > 0.8
    assert np.mean(other) < 0.3

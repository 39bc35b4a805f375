"""What to evaluate."""

import dataclasses
from pathlib import Path

from sws_export.errors import OptionError
from sws_export.sampling.draw import Drawing

INTENSITIES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Images that differ in the intensity only; the images of one prompt and seed."""

    prompt: str
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What to draw and measure.

    Attributes:
        prompts: Each is drawn with every seed.
        seeds: Number of seeds: 0, 1, ….
        frames: Frames of a slow walk through the noise of each pair, for the flicker; 1 for none.
        clip: Directory of a CLIP model, to measure how well images match their prompts.
        drawing: Steps, guidance and size.
        pad: Pad latents to the next size that the UNet takes, and crop.
        trust_code: Import `pipeline.py` of the pipeline directory if diffusers does not have its class, and
            its `check.py`.
        engine_host_code_allowed: See `Session.load`.
    """

    prompts: tuple[str, ...]
    seeds: int = 1
    frames: int = 1
    clip: Path | None = None
    drawing: Drawing = dataclasses.field(default_factory=Drawing)
    pad: bool = True
    trust_code: bool = False
    engine_host_code_allowed: bool = False

    def __post_init__(self) -> None:
        if not self.prompts:
            raise OptionError("nothing to evaluate: give at least one prompt")
        if len(set(self.prompts)) < len(self.prompts):
            twice = next(prompt for prompt in self.prompts if self.prompts.count(prompt) > 1)
            raise OptionError(f"--prompts: '{twice}' is there more than once; its pairs would count twice")
        for name in ("seeds", "frames"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} {getattr(self, name)} is out of range; at least 1 is needed")
        self.drawing.check()

    @property
    def pairs(self) -> list[Pair]:
        """Every prompt with every seed."""
        return [Pair(prompt, seed) for prompt in self.prompts for seed in range(self.seeds)]

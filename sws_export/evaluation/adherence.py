"""How well images match their prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sws_export.calibration.pipeline_class import import_code
from sws_export.checkpoint.config import read_json
from sws_export.errors import CheckpointError
from sws_export.evaluation.metrics import ImageArray

CHECKER = "check.py"

Scorer = Callable[[str, ImageArray], float]
"""The score of an image, float32 [H, W, C] in [0, 1], for its prompt."""


def pipeline_checker(pipeline: Path, *, trust_code: bool) -> Scorer | None:
    """`adherence(prompt, image)` of the pipeline's own `check.py`: the share of the prompt in the image.

    The function gets the image as float32 [C, H, W] in [-1, 1].

    Args:
        pipeline: A pipeline directory.
        trust_code: Whether its code may be imported.

    Returns:
        None if the code is not trusted, or there is none.
    """
    if not trust_code or not (pipeline / CHECKER).is_file():
        return None
    check = getattr(import_code(pipeline, CHECKER), "adherence", None)
    if check is None:
        return None
    return lambda prompt, image: float(
        check(prompt, np.asarray(image.transpose(2, 0, 1) * 2 - 1, np.float32))
    )


def check_clip(folder: Path) -> None:
    """Reject a directory that is not a CLIP model, before images are drawn.

    Raises:
        CheckpointError: The directory has no configuration, or that of another model.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(f"--clip {folder}: config.json is missing; give the directory of a CLIP model")
    kind = read_json(config, dict[str, Any]).get("model_type")
    if kind != "clip":
        raise CheckpointError(f"--clip {folder}: expected a model of type clip, found {kind}")


def clip_scorer(folder: Path) -> Scorer:
    """The CLIP score: 100 max(cos, 0) of the embeddings of image and prompt.

    Hessel et al., "CLIPScore: a reference-free evaluation metric for image captioning", 2021, with w = 100 as
    in torchmetrics. Prompts are truncated to the length that the model takes.

    Args:
        folder: Model and processor as transformers saves them, with weights in safetensors.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    import torch
    from transformers import CLIPModel, CLIPProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    # transformers recommends torchvision's processor each time, whose resizing differs from CLIP's own.
    logging.set_verbosity_error()
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # configurations and weights can be malformed in many ways
        raise CheckpointError(f"--clip {folder}: transformers cannot load it: {error}") from error
    longest = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def score(prompt: str, image: ImageArray) -> float:
        pixels = np.clip(image * 255.0, 0, 255).round().astype(np.uint8)
        inputs = processor(
            text=[prompt], images=[pixels], return_tensors="pt", truncation=True, max_length=longest
        )
        found = model(**inputs)
        cosine = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        return 100.0 * max(float(cosine), 0.0)

    return score

"""The images of a pair: drawn, kept in a file, and read back by a later run."""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sws_export.checkpoint.config import read_json
from sws_export.errors import OptionError
from sws_export.evaluation.options import INTENSITIES, EvaluationOptions, Pair
from sws_export.files import output_errors, publish, staged_directory
from sws_export.progress import Stage
from sws_export.runtime.contract import Contract
from sws_export.sampling.draw import draw
from sws_export.sampling.effects import Floats
from sws_export.sampling.predicted_image import recorded_steps

FRAME_ANGLE = 0.05
"""Angle in radians between the noises of consecutive frames, which differ by 5 % of their norm."""

_FORMAT = 1
# Below 2**32, of which torch's generator on the CPU takes the remainder.
_WALK_SEED = 1 << 31


@dataclasses.dataclass(frozen=True)
class PairImages:
    """The images of a pair.

    Attributes:
        images: uint8 [intensities, frames, H, W, C], as a PNG would have them.
        changes: Change of the predicted image from step to step in the first frame, float32
            [intensities, steps - 1].
    """

    images: npt.NDArray[np.uint8]
    changes: npt.NDArray[np.float32]


def check_walk(pipe: Any) -> None:
    """Reject a pipeline whose noise cannot be given, before anything is drawn.

    Raises:
        OptionError: The pipeline has no argument `latents`.
    """
    if "latents" not in inspect.signature(type(pipe).__call__).parameters:
        raise OptionError(
            f"{type(pipe).__name__} has no argument latents, so that its noise cannot be moved from frame to "
            "frame; leave out --frames"
        )


def draw_pair(pipe: Any, unet: Any, pair: Pair, options: EvaluationOptions, stage: Stage) -> PairImages:
    """Draw all intensities and frames of a pair, one image at a time, each from a zero state."""
    images, changes = [], []
    for intensity in INTENSITIES:
        stage.describe(f"intensity {intensity:g}: {pair.prompt}")
        unet.reset()
        with recorded_steps(pipe.scheduler) as record:
            frames = [_eight_bit(draw(pipe, pair.prompt, pair.seed, intensity, options.drawing))]
        stage.advance()
        for number in range(1, options.frames):
            unet.reset()
            noise = walk(record.noise, pair.seed, number)
            image = draw(pipe, pair.prompt, pair.seed, intensity, options.drawing, latents=noise)
            frames.append(_eight_bit(image))
            stage.advance()
        images.append(np.stack(frames))
        changes.append([float(moved[0]) for moved in record.changes])
    return PairImages(np.stack(images), np.asarray(changes, np.float32))


def _eight_bit(image: Floats) -> npt.NDArray[np.uint8]:
    pixels: npt.NDArray[np.uint8] = np.clip(image * 255.0, 0.0, 255.0).round().astype(np.uint8)
    return pixels


def walk(noise: Any, seed: int, frame: int) -> Any:
    """The noise of a frame: rotated towards another noise, so that its distribution stays the same.

    Args:
        noise: Of frame 0, [1, C, H, W].
        seed: Of the pair.
        frame: Number of the frame.
    """
    import torch

    generator = torch.Generator().manual_seed(_WALK_SEED + seed)
    target = torch.randn(noise.shape, generator=generator)
    angle = FRAME_ANGLE * frame
    return math.cos(angle) * noise + math.sin(angle) * target


class PairStore:
    """A folder with the images of finished pairs, under the digest of everything that they depend on."""

    def __init__(self, folder: Path, basis: dict[str, Any]) -> None:
        self._folder = folder
        self._basis = basis

    def load(self, pair: Pair) -> PairImages | None:
        """The images of a pair; None if they were not drawn yet, or the file is damaged."""
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            with self._path(pair).open("rb") as file, np.load(file, allow_pickle=False) as stored:
                found = PairImages(stored["pictures"], stored["changes"])
            if found.images.ndim == 5 and len(found.images) == len(found.changes) == len(INTENSITIES):
                return found
        return None

    def has(self, pair: Pair) -> bool:
        """Whether a file with the images of a pair exists."""
        return self._path(pair).is_file()

    def save(self, pair: Pair, images: PairImages) -> None:
        """Write the images of a pair.

        Raises:
            OutputError: The folder is not writable, or the disk is full.
        """
        path = self._path(pair)
        with output_errors(path):
            self._folder.mkdir(exist_ok=True)
        with staged_directory(path) as scratch:
            staged = scratch / path.name
            # The name in the files of earlier versions, whose pairs are read back.
            np.savez_compressed(staged, pictures=images.images, changes=images.changes)
            publish(staged, path)

    def _path(self, pair: Pair) -> Path:
        text = json.dumps(self._basis | dataclasses.asdict(pair), sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"


def basis_of(contract: Contract, pipeline: Path, options: EvaluationOptions) -> dict[str, Any]:
    """What the images of every pair depend on, as JSON values.

    The artefact counts by the sha256 of its files, and the pipeline by names, sizes and times of its files.
    """
    manifest = contract.manifest
    return {
        "format": _FORMAT,
        "artefact": sorted(file["sha256"] for file in manifest["files"]),
        "prediction": [manifest["source"].get(name) for name in ("prediction_type", "sampling")],
        "pipeline": _stamps(pipeline),
        "drawing": dataclasses.asdict(options.drawing),
        "pad": options.pad,
        "frames": options.frames,
        "intensities": INTENSITIES,
        "diffusers": version("diffusers"),
    }


def _stamps(pipeline: Path) -> list[list[str | int]]:
    """Name, size and time of the pipeline's own files and those of its components, without the UNet."""
    index = read_json(pipeline / "model_index.json", dict[str, Any])
    folders = [pipeline / name for name in index if not name.startswith("_") and name != "unet"]
    files = [file for file in pipeline.glob("*") if file.suffix in (".py", ".json")]
    files += [file for folder in folders for file in folder.rglob("*")]
    return [
        [str(file.relative_to(pipeline)), file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(files)
        if file.is_file()
    ]

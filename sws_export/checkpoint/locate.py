"""Finds the weight files and the configurations that belong to a path."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from sws_export.checkpoint.config import UNET_CLASS, read_json
from sws_export.checkpoint.schemas import ModelIndex, ShardIndex, VaeConfig
from sws_export.errors import CheckpointError

_STEM = "diffusion_pytorch_model"
_SUFFIX = ".safetensors"
_INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
PICKLES = {".ckpt", ".bin", ".pt", ".pth", ".pkl"}


@dataclass(frozen=True)
class Location:
    """Files that belong to one UNet.

    Attributes:
        weights: The weight files, sorted by name.
        index: The shard index, or None.
        config: The config.json beside the weights, or None.
        pipeline: The directory of the pipeline that contains the UNet, or None.
        remarks: Notes for the user.
        ema: Whether the weights are exponential moving averages, in a directory of their own.
    """

    weights: tuple[Path, ...]
    index: Path | None
    config: Path | None
    pipeline: Path | None
    remarks: tuple[str, ...] = ()
    ema: bool = False


def locate(path: Path, variant: str | None = None, *, ema: bool = False) -> Location:
    """Find the weights at `path`: a file, a shard index, a UNet directory or a pipeline directory.

    `variant` selects `diffusion_pytorch_model.<variant>.safetensors`, as in diffusers. If it is None, the
    file without a variant is selected, or the only variant. `ema` selects `unet_ema` instead of `unet` in a
    directory that contains both, as diffusers' training scripts write it.

    Raises:
        CheckpointError: The path does not exist, the directory contains no UNet or several, or the file type
            is not supported.
    """
    try:
        return _locate(path, variant, ema)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _locate(path: Path, variant: str | None, ema: bool) -> Location:
    if path.is_dir():
        return _locate_in_directory(path, variant, ema)
    if not path.exists():
        if path.is_symlink():
            raise CheckpointError(_broken_link_message(path))
        raise CheckpointError(f"{path} does not exist; pass a .safetensors file or a diffusers directory")
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(_pickle_message(path))
    if variant is not None:
        raise CheckpointError(
            f"{path} is a file: --variant chooses among the files of a directory; leave it out, or pass the "
            "directory"
        )
    if path.name.endswith(".index.json") or (_SUFFIX + ".index.") in path.name:
        return _with_index(path, path.parent, ())
    if path.suffix.lower() == ".gguf":
        raise CheckpointError(
            f"{path} is a GGUF file, whose quantized weights are not supported; "
            "use the model's safetensors file"
        )
    if path.suffix.lower() != _SUFFIX:
        raise CheckpointError(
            f"{path}: files of type '{path.suffix or path.name}' are not supported; "
            "pass a .safetensors file, a shard index (.safetensors.index.json) or a diffusers directory"
        )
    if _SHARD.search(path.name):
        raise CheckpointError(
            f"{path} is one shard of a model; pass its index (.safetensors.index.json) or its directory"
        )
    return Location((path,), None, _existing(path.parent / "config.json"), _pipeline_of(path.parent))


def unet_folders(*, ema: bool) -> tuple[str, ...]:
    """Folders of a model directory that may have the UNet, in the order in which they are searched."""
    return ("unet_ema", "unet", "") if ema else ("unet", "", "unet_ema")


def _locate_in_directory(directory: Path, variant: str | None, ema: bool) -> Location:
    for name in unet_folders(ema=ema):
        if (directory / name).is_dir():
            found = _select(directory / name, variant)
            if found is not None:
                return _with_ema_remark(found) if name == "unet_ema" else found
    raise CheckpointError(_no_unet_message(directory, variant))


def _with_ema_remark(location: Location) -> Location:
    remark = f"using the exponential moving averages in {location.weights[0].parent}"
    return replace(location, ema=True, remarks=(*location.remarks, remark))


def _select(directory: Path, variant: str | None) -> Location | None:
    """The weights in `directory`, or None if it contains none."""
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    chosen = choose_weights(names, variant, str(directory))
    return _selected(directory, chosen.name, chosen.remarks) if chosen else None


class ChosenWeights(NamedTuple):
    """Name of a weight file or shard index, and remarks on the choice."""

    name: str
    remarks: tuple[str, ...] = ()


def choose_weights(names: Sequence[str], variant: str | None, directory: str) -> ChosenWeights | None:
    """Choose the UNet's weights among the files of a directory, or None if it contains none.

    Args:
        names: Names of the files, sorted.
        variant: The variant to choose; None for the file without one, or the only variant.
        directory: Name of the directory, for messages.

    Raises:
        CheckpointError: There are several variants or models to choose from.
    """
    by_variant: dict[str, str] = {}
    for name in names:
        found = variant_of(name)
        # A single file takes precedence over an index beside it.
        if found is not None and (found not in by_variant or name.endswith(_SUFFIX)):
            by_variant[found] = name
    if variant is not None:
        return ChosenWeights(by_variant[variant]) if variant in by_variant else None
    if "" in by_variant:
        others = ", ".join(sorted(set(by_variant) - {""}))
        remark = f"{directory}: using {by_variant['']}; other variants: {others} (--variant)"
        return ChosenWeights(by_variant[""], (remark,) if others else ())
    if len(by_variant) == 1:
        ((found, name),) = by_variant.items()
        return ChosenWeights(name, (f"{directory}: using the only weights, variant '{found}'",))
    if by_variant:
        raise CheckpointError(
            f"{directory} contains several variants: {', '.join(by_variant)}; choose one with --variant"
        )
    other = [name for name in names if name.endswith(_SUFFIX)]
    if len(other) == 1:
        return ChosenWeights(other[0])
    if other:
        raise CheckpointError(
            f"{directory} contains several models: {', '.join(other)}; pass one of these files"
        )
    return None


def variant_of(name: str) -> str | None:
    """The variant in the name of a weight file or shard index, "" if it has none; None for other files."""
    if not name.startswith(_STEM + "."):
        return None
    rest = name.removeprefix(_STEM)
    if rest.endswith(".json") and (_SUFFIX + ".index.") in rest:
        # diffusers writes `.safetensors.index.fp16.json`; `.fp16.safetensors.index.json` exists, too.
        before, _, after = rest.partition(_SUFFIX + ".index.")
        return before.removeprefix(".") or after.removesuffix("json").removesuffix(".")
    if rest.endswith(_SUFFIX) and not _SHARD.search(rest):
        return rest.removesuffix(_SUFFIX).removeprefix(".")
    return None


def _selected(directory: Path, name: str, remarks: tuple[str, ...]) -> Location:
    if name.endswith(".json"):
        return _with_index(directory / name, directory, remarks)
    config = _existing(directory / "config.json")
    return Location((directory / name,), None, config, _pipeline_of(directory), remarks)


def _with_index(index: Path, directory: Path, remarks: tuple[str, ...]) -> Location:
    names = sorted(set(read_json(index, ShardIndex)["weight_map"].values()))
    for name in names:
        if not name.endswith(_SUFFIX):
            raise CheckpointError(
                f"{index} names '{name}'; expected .safetensors files in the same directory"
            )
        if (directory / name).is_symlink() and not (directory / name).exists():
            raise CheckpointError(_broken_link_message(directory / name))
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{index} names {name}, which does not exist ({len(names)} shards); download it"
            )
    config = _existing(directory / "config.json")
    shards = tuple(directory / name for name in names)
    return Location(shards, index, config, _pipeline_of(directory), remarks)


def _existing(file: Path) -> Path | None:
    return file if file.is_file() else None


def _pipeline_of(directory: Path) -> Path | None:
    """The pipeline directory that contains the UNet in `directory`, or None."""
    # Not resolve(): a directory behind a symbolic link belongs to the pipeline that contains the link.
    directory = Path(os.path.abspath(directory))  # noqa: PTH100
    if directory.name in ("unet", "unet_ema") or (directory.parent / "model_index.json").is_file():
        return directory.parent
    return None


def _broken_link_message(path: Path) -> str:
    return f"{path} is a broken symbolic link to {path.readlink()}; download the model again"


def _no_unet_message(directory: Path, variant: str | None) -> str:
    wanted = f"{_STEM}{'.' + variant if variant else ''}{_SUFFIX}"
    message = f"{directory} contains no UNet: expected unet/{wanted}, {wanted} or their .index.json"
    index = directory / "model_index.json"
    if index.is_file():
        parts = read_json(index, ModelIndex)
        for entry in (parts.get("transformer"), parts.get("prior"), parts.get("decoder")):
            if isinstance(entry, list) and entry:
                kind = entry[-1]
                pipeline = parts.get("_class_name")
                return f"{message}; this is a {pipeline}, which uses a {kind}, not a {UNET_CLASS}"
    files = [
        file
        for candidate in (directory / "unet", directory)
        if candidate.is_dir()
        for file in sorted(candidate.iterdir())
    ]
    for file in files:
        if file.is_symlink() and not file.exists():
            return f"{message}; {_broken_link_message(file)}"
        if file.suffix.lower() in PICKLES:
            return f"{message}; found {file.name}. {_pickle_message(file)}"
    return message


def _pickle_message(file: Path) -> str:
    if file.suffix.lower() == ".bin":
        convert = (
            'python -c "from diffusers import UNet2DConditionModel as M; '
            f"M.from_pretrained('{file.parent}', use_safetensors=False).save_pretrained('OUT')\""
        )
    else:
        convert = (
            'python -c "import torch; from safetensors.torch import save_file; '
            f"d = torch.load('{file}', map_location='cpu', weights_only=True); d = d.get('state_dict', d); "
            "save_file({k: v.clone().contiguous() for k, v in d.items() if isinstance(v, torch.Tensor)}, "
            f"'{file.with_suffix('.safetensors').name}')\""
        )
    return (
        f"{file} is a pickle, and loading a pickle executes the code in it, so it is not supported; "
        f"if you trust the file, convert it: {convert}"
    )


def pipeline_vae_scale(location: Location) -> int | None:
    """Pixels for each latent element, from the pipeline's VAE; None without one."""
    file = _existing(location.pipeline / "vae" / "config.json") if location.pipeline else None
    if file is None:
        return None
    channels = read_json(file, VaeConfig).get("block_out_channels")
    return int(2 ** (len(channels) - 1)) if channels else None


def pipeline_scheduler(location: Location) -> Path | None:
    """The configuration of the pipeline's scheduler; None without one."""
    return _existing(location.pipeline / "scheduler" / "scheduler_config.json") if location.pipeline else None

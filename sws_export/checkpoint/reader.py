"""Opens a checkpoint: headers and configuration, no weights."""

from pathlib import Path
from typing import Any

from sws_export.checkpoint.config import read_unet_config
from sws_export.checkpoint.header import StoredTensor, read_header
from sws_export.checkpoint.locate import Location, locate, pipeline_facts
from sws_export.checkpoint.model import Checkpoint
from sws_export.errors import CheckpointError


def open_checkpoint(
    path: Path,
    config: Path | None = None,
    *,
    ema: bool = False,
    variant: str | None = None,
) -> Checkpoint:
    """Find out what UNet `path` holds. Reads headers only.

    Raises:
        CheckpointError: No UNet2DConditionModel can be read from `path`; the message says why.
    """
    location = locate(path, variant)
    if ema:
        raise CheckpointError(f"{path}: no EMA weights (keys under model_ema.) to take with --ema")
    stored = _read_headers(location)
    values, source = _configuration(location, config)
    vae_scale, prediction_type = pipeline_facts(location)
    if vae_scale is None and values["in_channels"] == 3:
        vae_scale = 1
    return Checkpoint(
        path=path,
        files=location.weights,
        config=values,
        config_source=source,
        family=None,
        layout="diffusers",
        stored=stored,
        ignored={},
        vae_scale=vae_scale,
        prediction_type=prediction_type,
        remarks=location.remarks,
    )


def _read_headers(location: Location) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in location.weights:
        for name, tensor in read_header(file).tensors.items():
            if name in tensors:
                raise CheckpointError(f"tensor '{name}' is in both {tensors[name].file} and {file}")
            tensors[name] = tensor
    return tensors


def _configuration(location: Location, config: Path | None) -> tuple[dict[str, Any], str]:
    if config is not None:
        return read_unet_config(config), f"--config {config}"
    if location.config is not None:
        return read_unet_config(location.config), "config.json beside the file"
    raise CheckpointError(f"{location.weights[0].parent} has no config.json; give one with --config FILE")

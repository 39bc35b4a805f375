"""Opens a checkpoint: reads headers and configuration, but no weights."""

import dataclasses
from pathlib import Path
from typing import Any

from sws_export.checkpoint.architecture import Architecture, read_architecture
from sws_export.checkpoint.config import UNET_CLASS, read_json
from sws_export.checkpoint.header import Header, StoredTensor, read_header
from sws_export.checkpoint.ip_adapter import with_ip_adapters
from sws_export.checkpoint.layouts import find_unet
from sws_export.checkpoint.locate import Location, locate, pipeline_scheduler, pipeline_vae_scale
from sws_export.checkpoint.model import Checkpoint
from sws_export.checkpoint.quantization import with_scales
from sws_export.checkpoint.read_prediction import find_prediction
from sws_export.checkpoint.schemas import ShardIndex
from sws_export.errors import CheckpointError


def open_checkpoint(
    path: Path,
    config: Path | None = None,
    *,
    ema: bool = False,
    variant: str | None = None,
    attention_head_dim: tuple[int, ...] | None = None,
    prediction_type: str | None = None,
) -> Checkpoint:
    """Read the description of the UNet at `path` from headers only, without importing torch or diffusers.

    Args:
        path: A .safetensors file in diffusers' or the original layout, a shard index, a UNet directory or a
            pipeline directory.
        config: The config.json of a UNet2DConditionModel, for a UNet of an unknown family.
        ema: Read the exponential moving averages of an original checkpoint or directory that contains both.
        variant: The variant in a directory; "fp16" selects diffusion_pytorch_model.fp16.safetensors.
        attention_head_dim: Number of attention heads of each level, or one number for all levels, for a UNet
            of an unknown family.
        prediction_type: As `Prediction.type`; overrides the checkpoint's own.

    Raises:
        CheckpointError: `path` contains no supported UNet2DConditionModel.
    """
    location = locate(path, variant, ema=ema)
    header = _read_headers(location)
    unet = find_unet(path, header.tensors, ema and not location.ema)
    unet = dataclasses.replace(unet, stored=with_scales(path, unet.stored, header.metadata))
    file, beside = (config, ()) if config is not None else _config_beside(location)
    architecture = read_architecture(
        path, unet.layout, unet.stored, file, config is not None, attention_head_dim
    )
    prediction = find_prediction(
        prediction_type, pipeline_scheduler(location), header, architecture.structure, unet.stored
    )
    return Checkpoint(
        path=path,
        files=location.weights,
        config=with_ip_adapters(architecture.config, unet.stored),
        config_source=architecture.source,
        family=architecture.family.name if architecture.family is not None else None,
        layout=unet.layout,
        stored=unet.stored,
        ignored=unet.ignored,
        vae_scale=pipeline_vae_scale(location) or _family_vae_scale(architecture),
        prediction=prediction,
        remarks=(*location.remarks, *beside, *architecture.remarks, prediction.remark()),
    )


def _read_headers(location: Location) -> Header:
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in location.weights:
        header = read_header(file)
        metadata |= header.metadata
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(f"tensor '{name}' is in both {tensors[name].file} and {file}")
            tensors[name] = tensor
    if location.index is not None:
        _check_index(location.index, tensors)
    return Header(tensors, metadata)


def _check_index(index: Path, tensors: dict[str, StoredTensor]) -> None:
    for name, file in read_json(index, ShardIndex)["weight_map"].items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(
                f"{index}: tensor '{name}' is not in {file}, where the index expects it; download both again"
            )


def _config_beside(location: Location) -> tuple[Path | None, tuple[str, ...]]:
    """The config.json beside the weights, if it is a UNet's, and remarks."""
    if location.config is None:
        return None, ()
    content: dict[str, Any] = read_json(location.config, dict[str, Any])
    if content.get("_class_name") == UNET_CLASS or "block_out_channels" in content:
        return location.config, ()
    found = content.get("_class_name") or content.get("model_type") or "another model"
    return None, (f"ignored {location.config}: configuration of {found}, not of a {UNET_CLASS}",)


def _family_vae_scale(architecture: Architecture) -> int | None:
    if architecture.config["in_channels"] == 3:
        return 1
    return architecture.family.vae_scale if architecture.family is not None else None

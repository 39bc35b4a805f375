"""Assigns the tensors of a LoRA file to layers of a UNet."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sws_export.checkpoint.header import Header, StoredTensor
from sws_export.checkpoint.weights import read_tensor
from sws_export.errors import CheckpointError

_KOHYA = "lora_unet_"
_TEXT_ENCODERS = ("lora_te_", "lora_te1_", "lora_te2_", "text_encoder.", "text_encoder_2.", "te1_", "te2_")
_UNET_PREFIXES = ("base_model.model.unet.", "base_model.model.", "unet.", "diffusion_model.")
_PART = re.compile(r"^(?P<layer>.*)\.(?P<role>lora_A|lora_B|lora_down|lora_up)(\.\w+)?\.weight$")
_ROLES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}

# Adaptations with another formula than LoRA's.
_UNSUPPORTED = {
    r"\.hada_w": "LoHa",
    r"\.lokr_w": "LoKr",
    r"\.oft_": "OFT",
    r"\.lora_mid\.": "LoCon with Tucker decomposition",
    r"\.dora_scale|lora_magnitude_vector": "DoRA",
    r"\.diff(_b)?$": "full differences",
}

# Kohya's trainer names layers after the original UNet for SDXL, and after diffusers' for SD 1.x and 2.x.
_BLOCK = re.compile(r"^lora_unet_(input|output)_blocks_(\d+)_(\d+)_(.*)$")
_MIDDLE = re.compile(r"^lora_unet_middle_block_([0-2])_(.*)$")
_ORIGINAL_PARTS = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ORIGINAL_OUTSIDE = {
    "lora_unet_input_blocks_0_0": "lora_unet_conv_in",
    "lora_unet_out_2": "lora_unet_conv_out",
    "lora_unet_time_embed_0": "lora_unet_time_embedding_linear_1",
    "lora_unet_time_embed_2": "lora_unet_time_embedding_linear_2",
    "lora_unet_label_emb_0_0": "lora_unet_add_embedding_linear_1",
    "lora_unet_label_emb_0_2": "lora_unet_add_embedding_linear_2",
}


@dataclass
class LoraNames:
    """The tensors of a LoRA file by layer, under the file's names of the layers.

    Attributes:
        down: Name of each layer's [rank, in] tensor.
        up: Name of each layer's [out, rank] tensor.
        alpha: Name of each layer's alpha tensor, if it has one.
        matched: Diffusers' name of the weight that each layer changes.
        unmatched: Layers that the UNet does not have.
        ignored: The reason for each tensor that is ignored.
        metadata: PEFT's configuration, if the file contains it.
    """

    down: dict[str, str] = field(default_factory=dict)
    up: dict[str, str] = field(default_factory=dict)
    alpha: dict[str, str] = field(default_factory=dict)
    matched: dict[str, str] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()
    ignored: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    def factor(self, layer: str, rank: int, tensors: Mapping[str, StoredTensor]) -> float:
        """alpha / rank of a layer; 1 without alpha."""
        if layer in self.alpha:
            return float(read_tensor(tensors[self.alpha[layer]]).float().reshape(-1)[0]) / rank
        alpha = self.metadata.get("lora_alpha", rank)
        for pattern, value in (self.metadata.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?{pattern}$", layer):
                alpha = value
        return float(alpha) / (math.sqrt(rank) if self.metadata.get("use_rslora") else rank)


def read_names(
    path: Path, header: Header, weights: Mapping[str, tuple[int, ...]], layers_per_block: int | list[int]
) -> LoraNames:
    """Assign the tensors of a LoRA file to layers, and match the layers with the UNet's weights.

    Raises:
        CheckpointError: The file is not a LoRA, is an adaptation of another kind, or has half of a pair.
    """
    kind = next(
        (
            kind
            for mark, kind in _UNSUPPORTED.items()
            if any(re.search(mark, name) for name in header.tensors)
        ),
        None,
    )
    if kind is not None:
        raise CheckpointError(
            f"{path} contains {kind}, expected a plain LoRA; merge it into the model with its own tools"
        )
    found = LoraNames(metadata=_peft_metadata(header))
    unet = [name for name in header.tensors if not name.startswith(_TEXT_ENCODERS)]
    found.ignored = ["text encoder"] * (len(header.tensors) - len(unet))
    for name, renamed in _peft_names(unet).items():
        _assign(found, name, renamed)
    if not found.down and not found.up:
        raise CheckpointError(
            f"{path} is not a LoRA: none of its {len(header.tensors)} tensors is a lora_down or lora_A"
        )
    half = sorted(set(found.down) ^ set(found.up))
    if half:
        raise CheckpointError(f"{path} is damaged: layer '{half[0]}' has only one of its two matrices")
    _match(found, weights, layers_per_block)
    return found


def _peft_names(names: Iterable[str]) -> dict[str, str]:
    """PEFT's name of each stored name; kohya's names are not changed."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    kohya, other = [], {}
    for name in names:
        if name.startswith(_KOHYA):
            kohya.append(name)
        else:
            prefix = next((prefix for prefix in _UNET_PREFIXES if name.startswith(prefix)), "")
            other[name.removeprefix(prefix)] = name
    # The converter only moves values, so the names are passed as values.
    converted: dict[str, str] = convert_unet_state_dict_to_peft(other)
    return {name: name for name in kohya} | {stored: renamed for renamed, stored in converted.items()}


def _assign(found: LoraNames, stored: str, renamed: str) -> None:
    part = _PART.match(renamed)
    if part is not None:
        side = found.down if _ROLES[part["role"]] == "down" else found.up
        side[part["layer"]] = stored
    elif renamed.endswith(".alpha"):
        found.alpha[renamed.removesuffix(".alpha").removesuffix(".lora")] = stored
    else:
        found.ignored.append("other")


def _match(
    found: LoraNames, weights: Mapping[str, tuple[int, ...]], layers_per_block: int | list[int]
) -> None:
    underscored = {_KOHYA + weight.removesuffix(".weight").replace(".", "_"): weight for weight in weights}
    for layer in found.down:
        if layer.startswith(_KOHYA):
            weight = underscored.get(_diffusers_layer(layer, layers_per_block), "")
        else:
            weight = f"{layer}.weight"
        if weight in weights:
            found.matched[layer] = weight
    found.unmatched = tuple(layer for layer in found.down if layer not in found.matched)


def _diffusers_layer(layer: str, layers_per_block: int | list[int]) -> str:
    """Kohya's name of a layer with the original block names replaced by diffusers' block names.

    diffusers' own converter is not used: it mistakes block 10 for block 1 and thus only supports SDXL.
    """
    if layer in _ORIGINAL_OUTSIDE:
        return _ORIGINAL_OUTSIDE[layer]
    middle = _MIDDLE.match(layer)
    if middle is not None:
        kind, number = (("resnets", 0), ("attentions", 0), ("resnets", 1))[int(middle[1])]
        return f"{_KOHYA}mid_block_{kind}_{number}_{_diffusers_part(middle[2])}"
    block = _BLOCK.match(layer)
    if block is None or not isinstance(layers_per_block, int):
        return layer
    direction = "down" if block[1] == "input" else "up"
    # Input block 0 is conv_in, and each level has a block for each layer and one that downsamples.
    number = int(block[2]) - (1 if direction == "down" else 0)
    level, position = divmod(number, layers_per_block + 1)
    prefix = f"{_KOHYA}{direction}_blocks_{level}"
    if block[4] in ("op", "conv"):
        return f"{prefix}_{direction}samplers_0_conv"
    return f"{prefix}_{'resnets' if block[3] == '0' else 'attentions'}_{position}_{_diffusers_part(block[4])}"


def _diffusers_part(part: str) -> str:
    return _ORIGINAL_PARTS.get(part, part)


def _peft_metadata(header: Header) -> dict[str, Any]:
    """The UNet's part of the adapter configuration that diffusers stores in the file's metadata."""
    try:
        content = json.loads(header.metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        return {}
    if not isinstance(content, dict):
        return {}
    return {name.removeprefix("unet."): value for name, value in content.items() if name.startswith("unet.")}

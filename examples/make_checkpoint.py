"""Writes a UNet checkpoint of a known family with random weights and real shapes.

    python examples/make_checkpoint.py --family sd15 --dtype fp16 --out unet-sd15.safetensors

The output is deterministic. Tensors are written one by one, so little memory is needed.
"""

import argparse
import copy
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sws_export.checkpoint.check import expected_shapes
from sws_export.checkpoint.families import FAMILIES
from sws_export.tensors import PRECISIONS, Precision

FAMILY_NAMES = {
    "sd15": "SD 1.x",
    "sd15-inpaint": "SD 1.x inpainting",
    "sd15-pix2pix": "SD 1.x instruct-pix2pix",
    "sd15-lcm": "SD 1.x LCM",
    "sd21": "SD 2.x",
    "sdxl": "SDXL base",
    "sdxl-inpaint": "SDXL inpainting",
    "sdxl-lcm": "SDXL LCM",
    "sdxl-refiner": "SDXL refiner",
    "ssd1b": "SSD-1B",
    "vega": "Segmind-Vega",
    "koala-700m": "KOALA-700M",
    "koala-1b": "KOALA-1B",
    "small-sd": "BK-SDM base / small-sd",
    "tiny-sd": "BK-SDM tiny / tiny-sd",
}
# Number of random values. Prime, so that no row length of a matrix divides it and rows do not repeat.
_BLOCK = 16_777_213
# Elements scaled and written at a time; small enough for the processor's cache.
_CHUNK = 1 << 18


def family_config(family: str, small: bool = False) -> dict[str, Any]:
    """Configuration of a family, or with `small` of a small UNet with the same topology."""
    if family == "tiny":
        return family_config("sd15", small=True)
    name = FAMILY_NAMES[family]
    config = next(row for row in FAMILIES if row.name == name).config()
    return small_config(config) if small else config


def small_config(config: dict[str, Any]) -> dict[str, Any]:
    """A UNet with the same topology, 32 channels on the first level, heads of 32, short transformers."""
    channels = [32 * count // config["block_out_channels"][0] for count in config["block_out_channels"]]
    small = copy.deepcopy(config)
    small["block_out_channels"] = channels
    small["attention_head_dim"] = [count // 32 for count in channels]
    for option in ("transformer_layers_per_block", "reverse_transformer_layers_per_block"):
        small[option] = _at_most_two(config[option])
    return small


def _at_most_two(depth: Any) -> Any:
    if isinstance(depth, list):
        return [_at_most_two(item) for item in depth]
    return depth if depth is None else min(depth, 2)


def ldm_names(shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> dict[str, str]:
    """The name in the original layout, with its prefix, of each tensor of a UNet, by diffusers' name.

    Follows the construction of UNetModel in latent-diffusion, ldm/modules/diffusionmodules/openaimodel.py.
    """
    modules = _ldm_modules(shapes, config)
    return {name: "model.diffusion_model." + _ldm_name(name, modules) for name in shapes}


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _ldm_name(name: str, modules: dict[str, str]) -> str:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = modules.get(".".join(parts[:length]))
        if module is not None:
            rest = parts[length:]
            if ".resnets." in name:
                rest[0] = _RESNET[rest[0]]
            return ".".join([module, *rest])
    raise KeyError(name)


def _ldm_modules(shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> dict[str, str]:
    modules = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "time_embedding.cond_proj": "time_embed.cond_proj",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "class_embedding.linear_1": "label_emb.0.0",
        "class_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    block = 1
    for level in range(levels):
        for layer in range(layers):
            modules[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{block}.0"
            modules[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{block}.1"
            block += 1
        modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
        block += 1
    for block in range(levels * (layers + 1)):
        level, layer = divmod(block, layers + 1)
        modules[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{block}.0"
        modules[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{block}.1"
        if layer == layers:
            attends = any(name.startswith(f"up_blocks.{level}.attentions.") for name in shapes)
            place = 2 if attends else 1
            modules[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{block}.{place}.conv"
    return modules


def write_checkpoint(
    out: Path, config: dict[str, Any], layout: str = "diffusers", dtype: Precision = "fp16"
) -> Path:
    """Write random weights for `config` to `out` and return the file.

    `out` is a .safetensors file or a directory. With the diffusers layout, config.json is written beside the
    weights.
    """
    if out.suffix != ".safetensors":
        out.mkdir(parents=True, exist_ok=True)
        out = out / "diffusion_pytorch_model.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    if layout == "diffusers":
        content = {"_class_name": "UNet2DConditionModel", **config}
        (out.parent / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shapes = expected_shapes(config)
    names = ldm_names(shapes, config) if layout == "ldm" else {name: name for name in shapes}
    partial = out.with_suffix(".partial")
    with partial.open("wb") as stream:
        stream.write(_header(shapes, names, dtype))
        block = np.random.default_rng(0).standard_normal(_BLOCK, dtype=np.float32)
        for name, shape in shapes.items():
            for chunk in _values(name, shape, torch.from_numpy(block)):
                stored = chunk.to(getattr(torch, PRECISIONS[dtype].dtype)).contiguous()
                stream.write(stored.view(torch.uint8).numpy().data)
    partial.replace(out)
    return out


def _header(shapes: dict[str, tuple[int, ...]], names: dict[str, str], dtype: Precision) -> bytes:
    stored = PRECISIONS[dtype]
    entries: dict[str, Any] = {}
    begin = 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape) * stored.itemsize
        entries[names[name]] = {
            "dtype": stored.safetensors,
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _values(name: str, shape: tuple[int, ...], block: torch.Tensor) -> Iterator[torch.Tensor]:
    """Flat chunks of one tensor. Norms are the identity, other layers keep the variance of their input."""
    count = math.prod(shape)
    if len(shape) == 1:
        is_scale = name.endswith("weight")
        yield torch.ones(count) if is_scale else torch.zeros(count)
        return
    scale = 1 / math.sqrt(math.prod(shape[1:]))
    position = zlib.crc32(name.encode()) % _BLOCK
    while count > 0:
        chunk = block[position : position + min(count, _CHUNK)]
        yield chunk * scale
        count -= len(chunk)
        position = (position + len(chunk)) % _BLOCK


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a UNet checkpoint with random weights.")
    parser.add_argument("--family", choices=[*FAMILY_NAMES, "tiny"], required=True)
    parser.add_argument("--small", action="store_true", help="a small UNet with the same topology")
    parser.add_argument("--layout", choices=["diffusers", "ldm"], default="diffusers")
    parser.add_argument("--dtype", choices=list(PRECISIONS), default="fp16")
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file, or a directory")
    arguments = parser.parse_args()
    # The chunks are too small to benefit from several threads.
    torch.set_num_threads(1)
    config = family_config(arguments.family, arguments.small)
    file = write_checkpoint(arguments.out, config, arguments.layout, arguments.dtype)
    print(f"{file}: {file.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

"""Sparse files with the headers of checkpoints."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_ITEM_BYTES = {"F16": 2, "F32": 4, "I64": 8, "U8": 1}

Shapes = dict[str, tuple[int, ...]]
WriteSparse = Callable[..., Path]
UnetShapes = Callable[[dict[str, Any]], Shapes]


@pytest.fixture(scope="session")
def write_sparse() -> WriteSparse:
    """Write a safetensors file with a real header and zeros that need no space on disk."""

    def write(file: Path, shapes: Shapes, dtype: str = "F16", metadata: dict[str, str] | None = None) -> Path:
        entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + math.prod(shape) * _ITEM_BYTES[dtype]
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(entries).encode()
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        return file

    return write


@pytest.fixture(scope="session")
def unet_shapes() -> UnetShapes:
    """Names and shapes of a configuration's UNet, from diffusers; cached for the session."""
    from sws_export.checkpoint.check import expected_shapes

    known: dict[str, Shapes] = {}

    def shapes(config: dict[str, Any]) -> Shapes:
        key = json.dumps(config, sort_keys=True)
        if key not in known:
            known[key] = expected_shapes(config)
        return known[key]

    return shapes


@pytest.fixture(scope="session")
def tiny_config() -> dict[str, Any]:
    """A UNet of about 8 MB of an unknown family with attention on one level."""
    return {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 48,
        "attention_head_dim": 4,
    }


@pytest.fixture
def tiny_unet(
    tmp_path: Path, tiny_config: dict[str, Any], unet_shapes: UnetShapes, write_sparse: WriteSparse
) -> Path:
    """A UNet directory with zeros for weights."""
    directory = tmp_path / "tiny"
    write_sparse(directory / "diffusion_pytorch_model.safetensors", unet_shapes(tiny_config))
    (directory / "config.json").write_text(json.dumps(tiny_config))
    return directory

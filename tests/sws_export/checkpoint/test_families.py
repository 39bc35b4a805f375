"""The table of families, row by row and in both layouts."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel

from examples.make_checkpoint import ldm_names
from sws_export.checkpoint import open_checkpoint
from sws_export.checkpoint.config import DEFAULTS, complete
from sws_export.checkpoint.families import FAMILIES, Family, find_family
from tests.export_runs import check_names

by_name = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)

XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "use_linear_projection": True,
}
XL_BASE = XL | {
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
}
# The models' own config.json files, without diffusers' defaults.
PUBLISHED: dict[str, dict[str, Any]] = {
    "SD 1.x": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "SD 1.x inpainting": {"cross_attention_dim": 768, "attention_head_dim": 8, "in_channels": 9},
    "SD 1.x LCM": {"cross_attention_dim": 768, "attention_head_dim": 8, "time_cond_proj_dim": 256},
    "SD 2.x": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "SDXL base": XL_BASE,
    "SDXL refiner": XL
    | {
        "attention_head_dim": [6, 12, 24, 24],
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "projection_class_embeddings_input_dim": 2560,
        "transformer_layers_per_block": 4,
    },
    "SSD-1B": XL_BASE
    | {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [[1], [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "BK-SDM tiny / tiny-sd": {
        "cross_attention_dim": 768,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 1,
        "mid_block_type": None,
    },
}
# Millions of parameters, as published.
SIZES = {
    "SD 1.x": 860,
    "SD 2.x": 866,
    "SDXL base": 2567,
    "SSD-1B": 1331,
    "Segmind-Vega": 745,
    "KOALA-700M": 783,
}


@by_name
def test_diffusers_layout(family: Family, tmp_path: Path, unet_shapes: Any, write_sparse: Any) -> None:
    file = write_sparse(tmp_path / "unet.safetensors", unet_shapes(family.config()))
    checkpoint = open_checkpoint(file)
    assert (checkpoint.family, checkpoint.layout, checkpoint.config) == (
        family.name,
        "diffusers",
        family.config(),
    )
    assert checkpoint.config_source == f"inferred from tensor shapes: {family.name}"
    assert checkpoint.vae_scale == 8
    assert set(checkpoint.tensors) == set(unet_shapes(family.config()))


@by_name
def test_original_layout(family: Family, tmp_path: Path, unet_shapes: Any, write_sparse: Any) -> None:
    shapes = unet_shapes(family.config())
    ldm = ldm_names(shapes, family.config())
    assert len(set(ldm.values())) == len(shapes)
    file = write_sparse(tmp_path / "model.safetensors", {ldm[name]: shape for name, shape in shapes.items()})
    checkpoint = open_checkpoint(file)
    assert (checkpoint.family, checkpoint.layout, checkpoint.config) == (family.name, "ldm", family.config())
    # diffusers' conversion is the inverse of the independently constructed names.
    found = {f"model.diffusion_model.{name}": stored for name, stored in checkpoint.stored.items()}
    assert checkpoint.tensors == {name: found[ldm[name]] for name in shapes}
    assert check_names(checkpoint) == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_configuration_is_the_published_one(name: str, unet_shapes: Any) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    published = complete(PUBLISHED[name])
    assert unet_shapes(family.config()) == unet_shapes(published)
    heads = published["attention_head_dim"]
    levels = len(published["block_out_channels"])
    assert family.config()["attention_head_dim"] == ([heads] * levels if isinstance(heads, int) else heads)
    assert family.config()["addition_time_embed_dim"] == published["addition_time_embed_dim"]


@pytest.mark.parametrize("name", SIZES)
def test_size_is_the_published_one(name: str, tmp_path: Path, unet_shapes: Any, write_sparse: Any) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    checkpoint = open_checkpoint(write_sparse(tmp_path / "unet.safetensors", unet_shapes(family.config())))
    assert round(checkpoint.parameter_count / 1e6) == pytest.approx(SIZES[name], abs=1)
    assert checkpoint.nbytes == 2 * checkpoint.parameter_count
    assert checkpoint.dtypes == {"F16": checkpoint.nbytes}


def test_names_and_structures_are_unique() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert [find_family(family.structure) for family in FAMILIES] == list(FAMILIES)


def test_defaults_are_those_of_diffusers() -> None:
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    assert {name: value.default for name, value in parameters.items() if name != "self"} == DEFAULTS


def test_opening_imports_neither_torch_nor_diffusers(
    tmp_path: Path, unet_shapes: Any, write_sparse: Any
) -> None:
    config = FAMILIES[0].config()
    shapes = unet_shapes(config)
    names = ldm_names(shapes, config)
    file = write_sparse(tmp_path / "m.safetensors", {names[name]: shape for name, shape in shapes.items()})
    program = (
        "import sys; from pathlib import Path; from sws_export.checkpoint import open_checkpoint; "
        "checkpoint = open_checkpoint(Path(sys.argv[1])); "
        "print(checkpoint.family, checkpoint.parameter_count, {'torch', 'diffusers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True, check=True)
    assert result.stdout == "SD 1.x 859520964 set()\n"

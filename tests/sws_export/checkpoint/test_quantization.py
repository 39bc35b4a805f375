"""Checkpoints in float8, without and with ComfyUI's scales."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.make_checkpoint import family_config, ldm_names, write_checkpoint
from sws_export.checkpoint import Checkpoint, open_checkpoint, read_tensor, verify_weights
from sws_export.checkpoint.unet_module import load_unet
from sws_export.errors import CheckpointError
from sws_export.progress import SilentProgress
from sws_export.tracing.export_unet import plain_weights
from tests.export_runs import check_names

PREFIX = "model.diffusion_model."
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def small_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("unet"), family_config("tiny-sd", small=True))


def is_linear(name: str, value: torch.Tensor) -> bool:
    return value.ndim == 2 and name.endswith(".weight")


def quantized(
    small_unet: Path, dtype: torch.dtype, scale: str | None, names: dict[str, str]
) -> tuple[Tensors, Tensors]:
    """Tensors of a file with linear layers in `dtype`, and the exact weights by diffusers' names."""
    tensors, expected = {}, {}
    for name, value in load_file(small_unet).items():
        if not is_linear(name, value):
            tensors[names[name]], expected[name] = value, value.float()
            continue
        factor = value.float().abs().amax() / torch.finfo(dtype).max if scale else torch.ones(())
        stored = tensors[names[name]] = (value.float() / factor).to(dtype)
        if scale:
            tensors[names[name].removesuffix("weight") + scale] = factor
        expected[name] = stored.float() * factor
    return tensors, expected


def original_names(small_unet: Path) -> dict[str, str]:
    shapes = {name: tuple(value.shape) for name, value in load_file(small_unet).items()}
    return ldm_names(shapes, family_config("tiny-sd", small=True))


def assert_weights(checkpoint: Checkpoint, expected: Tensors) -> None:
    assert check_names(checkpoint) == 0
    assert checkpoint.tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(read_tensor(checkpoint.tensors[name]).float(), value), name
    loaded = load_unet(checkpoint, torch.float32).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    exported = plain_weights(checkpoint, "fp32", {})
    assert all((exported[name].numpy() == value.numpy()).all() for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_float8(dtype: torch.dtype, small_unet: Path, tmp_path: Path) -> None:
    tensors, expected = quantized(small_unet, dtype, None, {name: name for name in load_file(small_unet)})
    save_file(tensors, tmp_path / "x.safetensors")
    assert_weights(open_checkpoint(tmp_path / "x.safetensors", small_unet.parent / "config.json"), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_comfyuis_scaled_fp8(dtype: torch.dtype, small_unet: Path, tmp_path: Path) -> None:
    tensors, expected = quantized(small_unet, dtype, "scale_weight", original_names(small_unet))
    marker = {PREFIX + "scaled_fp8": torch.zeros(0, dtype=dtype)}
    inputs = {
        name.replace("scale_weight", "scale_input"): torch.ones(()) for name in tensors if "scale" in name
    }
    save_file(tensors | marker | inputs, tmp_path / "x.safetensors")
    assert_weights(open_checkpoint(tmp_path / "x.safetensors", small_unet.parent / "config.json"), expected)


@pytest.mark.parametrize("description", ["tensors", "metadata", "metadata without prefix"])
def test_comfyuis_quantized_layers(description: str, small_unet: Path, tmp_path: Path) -> None:
    tensors, expected = quantized(small_unet, torch.float8_e4m3fn, "weight_scale", original_names(small_unet))
    layers = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    quantization = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    metadata = None
    if description == "tensors":
        text = torch.tensor(list(json.dumps(quantization).encode()), dtype=torch.uint8)
        tensors |= {f"{layer}.comfy_quant": text.clone() for layer in layers}
    else:
        prefix = PREFIX if description.endswith("without prefix") else ""
        names = [layer.removeprefix(prefix) for layer in layers]
        content = {"format_version": "1.0", "layers": dict.fromkeys(names, quantization)}
        metadata = {"_quantization_metadata": json.dumps(content)}
    tensors |= {f"{layer}.input_scale": torch.ones(()) for layer in layers}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    assert_weights(open_checkpoint(tmp_path / "x.safetensors", small_unet.parent / "config.json"), expected)


@pytest.mark.parametrize("shape", [(32,), (32, 1)])
def test_a_scale_for_each_row(shape: tuple[int, ...], small_unet: Path, tmp_path: Path) -> None:
    weights = load_file(small_unet)
    scale = torch.arange(1.0, 33.0)
    weight = weights[f"{LAYER}.weight"].to(torch.float8_e4m3fn)
    changed = {f"{LAYER}.weight": weight, f"{LAYER}.weight_scale": scale.reshape(shape)}
    save_file(weights | changed, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors", small_unet.parent / "config.json")
    found = read_tensor(checkpoint.tensors[f"{LAYER}.weight"])
    assert torch.equal(found, weight.float() * scale[:, None])


def changed(small_unet: Path, tmp_path: Path, changes: Tensors, metadata: Any = None) -> Path:
    weights = load_file(small_unet)
    weights[f"{LAYER}.weight"] = weights[f"{LAYER}.weight"].to(torch.float8_e4m3fn)
    save_file(weights | changes, tmp_path / "x.safetensors", metadata)
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    ("changes", "metadata", "message"),
    [
        (
            {f"{LAYER}.weight_scale": torch.ones(2, 2)},
            None,
            rf"'{LAYER}.weight_scale' has shape \[2, 2\] for a weight of shape \[32, 32\]",
        ),
        (
            {"absent.scale_weight": torch.ones(())},
            None,
            "'absent.scale_weight' is the scale of 'absent.weight'",
        ),
        (
            {f"{LAYER}.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)},
            None,
            f"layer '{LAYER}' is quantized to nvfp4; expected float8_e4m3fn or float8_e5m2",
        ),
        ({}, {"_quantization_metadata": json.dumps({"layers": {LAYER: "mxfp8"}})}, "is quantized to mxfp8"),
        ({}, {"_quantization_metadata": "{"}, "the description of its quantization is not valid"),
    ],
)
def test_other_quantizations_are_named(
    changes: Tensors, metadata: Any, message: str, small_unet: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(changed(small_unet, tmp_path, changes, metadata), small_unet.parent / "config.json")


def test_layers_of_other_models_do_not_matter(small_unet: Path, tmp_path: Path) -> None:
    metadata = {"_quantization_metadata": json.dumps({"layers": {"text_encoder.x": "nvfp4"}})}
    file = changed(small_unet, tmp_path, {}, metadata)
    assert check_names(open_checkpoint(file, small_unet.parent / "config.json")) == 0


def test_a_scale_that_is_not_finite(small_unet: Path, tmp_path: Path) -> None:
    file = changed(small_unet, tmp_path, {f"{LAYER}.weight_scale": torch.tensor(float("nan"))})
    checkpoint = open_checkpoint(file, small_unet.parent / "config.json")
    with pytest.raises(CheckpointError, match=rf"tensor 'scale of {LAYER}.weight' .* contains NaN"):
        verify_weights(checkpoint, SilentProgress())

"""Compares the stored tensors with the configuration."""

from collections.abc import Mapping
from typing import Any

from sws_export.checkpoint.header import StoredTensor
from sws_export.checkpoint.model import Checkpoint
from sws_export.errors import CheckpointError, first_items

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

WeightShapes = Mapping[str, tuple[int, ...]]
"""Shapes of the weights of a UNet by their names in diffusers."""


def check_tensors(checkpoint: Checkpoint, expected: WeightShapes) -> int:
    """Compare names and shapes of the weights with those `expected`.

    Returns:
        The number of stored tensors that the UNet does not have.

    Raises:
        CheckpointError: A parameter is missing, has a different shape or is not a floating-point tensor.
    """
    found = checkpoint.tensors
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} of the {len(expected)} tensors that its UNet needs "
            f"({first_items(missing)}); configuration: {checkpoint.config_source}. "
            "Use the configuration that belongs to the weights (--config FILE) or another copy of the model"
        )
    wrong = [
        _difference(name, shape, found[name])
        for name, shape in expected.items()
        if shape != found[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path} does not fit its configuration ({checkpoint.config_source}): "
            f"{len(wrong)} tensors have another shape: {first_items(wrong)}. "
            "Use the configuration that belongs to the weights (--config FILE)"
        )
    quantized = [
        f"'{name}' {found[name].dtype}" for name in expected if found[name].dtype not in FLOAT_DTYPES
    ]
    if quantized:
        raise CheckpointError(
            f"{checkpoint.path}: {len(quantized)} tensors are not floating-point ({first_items(quantized)}): "
            "the model is quantized; use its fp16 version"
        )
    return len(checkpoint.stored) - len(expected)


def expected_shapes(config: dict[str, Any]) -> WeightShapes:
    """Names and shapes of the weights that a UNet2DConditionModel built from `config` needs.

    Raises:
        CheckpointError: diffusers rejects the configuration.
    """
    # Outside of the context: torch 2.4 to 2.6 cannot import diffusers while another device is the default.
    import torch

    from sws_export.checkpoint.unet_module import build_unet

    try:
        with torch.device("meta"):
            model = build_unet(config, "fp32")
    except (ValueError, TypeError, NotImplementedError, AttributeError, IndexError, KeyError) as error:
        raise CheckpointError(f"diffusers rejects the configuration of the UNet: {error}") from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _difference(name: str, shape: tuple[int, ...], stored: StoredTensor) -> str:
    return f"'{name}' expected {list(shape)}, found {list(stored.shape)}"

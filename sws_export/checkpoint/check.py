"""Do the stored tensors fit the configuration?"""

from typing import Any

from sws_export.checkpoint.header import StoredTensor
from sws_export.checkpoint.model import Checkpoint
from sws_export.errors import CheckpointError

_SHOWN = 3

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def check_tensors(checkpoint: Checkpoint) -> int:
    """Compare names and shapes with a UNet2DConditionModel built from the configuration, without memory.

    Returns:
        How many stored tensors the UNet has no use for.

    Raises:
        CheckpointError: Names the parameters that are missing or have another shape.
    """
    expected = expected_shapes(checkpoint.config)
    found = checkpoint.tensors
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} of the {len(expected)} tensors that its UNet needs "
            f"({_some(missing)}); configuration: {checkpoint.config_source}. "
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
            f"{len(wrong)} tensors have another shape: {_some(wrong)}. "
            "Use the configuration that belongs to the weights (--config FILE)"
        )
    odd = [f"'{name}' {found[name].dtype}" for name in expected if found[name].dtype not in FLOAT_DTYPES]
    if odd:
        raise CheckpointError(
            f"{checkpoint.path}: {len(odd)} tensors are no floating-point numbers ({_some(odd)}): "
            "the model is quantised; use the fp16 model"
        )
    return len(checkpoint.stored) - len(expected)


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes of the UNet that `config` describes.

    Raises:
        CheckpointError: diffusers refuses the configuration.
    """
    import torch
    from diffusers import UNet2DConditionModel

    try:
        with torch.device("meta"):
            model = UNet2DConditionModel.from_config(config)
    except (ValueError, TypeError, NotImplementedError, AttributeError, IndexError, KeyError) as error:
        raise CheckpointError(f"the UNet's configuration is refused by diffusers: {error}") from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _difference(name: str, shape: tuple[int, ...], stored: StoredTensor) -> str:
    return f"'{name}' expected {list(shape)}, found {list(stored.shape)}"


def _some(items: list[str]) -> str:
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more

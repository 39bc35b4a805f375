"""Latents of any size: padded to the next size that the UNet takes, and the prediction cropped."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sws_export.errors import StepError
from sws_export.runtime.contract import Contract
from sws_export.runtime.inputs import is_on_gpu, is_residual, numbers
from sws_export.runtime.pixels import nearest_sizes, with_pixels
from sws_export.tensors import concrete_shape

_SIDES = ("height", "width")


def padded_sides(contract: Contract, sample: Any) -> tuple[int, int] | None:
    """Height and width of the next latent that the UNet takes; None if `sample` needs no padding."""
    shape = np.shape(sample)
    if len(shape) != 4:
        return None
    multiple = contract.size_multiple
    height, width = (-(-side // multiple) * multiple for side in shape[2:])
    return None if (height, width) == tuple(shape[2:]) else (height, width)


def pad_inputs(contract: Contract, given: Mapping[str, Any], sides: tuple[int, int]) -> dict[str, Any]:
    """`given` with the sample and the ControlNet residuals padded for a latent of these sides.

    Rows are added at the bottom and columns at the right, as mirror images, which have the statistics of the
    noise. Residuals of other sizes than expected are left for the checks of the inputs.
    """
    sizes = {"batch": 1, "tokens": 1, "height": sides[0], "width": sides[1]}
    padded = dict(given)
    for spec in contract.inputs:
        if given.get(spec.name) is None or not (spec.name == "sample" or is_residual(spec.name)):
            continue
        value: Any = given[spec.name]
        array = value if is_on_gpu(value) else numbers(f"input {spec.name}", value)
        if array.ndim != 4:
            continue
        missing = np.subtract(concrete_shape(spec, sizes)[2:], array.shape[2:])
        if (missing >= 0).all():
            padded[spec.name] = _mirrored(array, (int(missing[0]), int(missing[1])))
    return padded


def _mirrored(array: Any, missing: tuple[int, int]) -> Any:
    """An array, or a torch tensor on a GPU, with rows and columns added."""
    rows, columns = (
        np.pad(np.arange(side), (0, more), mode="symmetric")
        for side, more in zip(array.shape[2:], missing, strict=True)
    )
    return array[:, :, rows][:, :, :, columns]


def reject_sides(contract: Contract, sample: Any) -> None:
    """Raise the error for a latent that would need padding.

    Raises:
        StepError: Always; names the nearest sizes that the UNet takes.
    """
    multiple = contract.size_multiple
    for name, side in zip(_SIDES, np.shape(sample)[2:], strict=True):
        if side % multiple:
            raise StepError(
                f"input sample: {name} {with_pixels(contract, side)} is not a multiple of {multiple}; the "
                f"nearest sizes are {nearest_sizes(contract, side, multiple)}; or load with pad=True"
            )

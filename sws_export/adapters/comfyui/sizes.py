"""Batches and latents that an artefact was not exported for: split, padded and cropped."""

import sys
from collections.abc import Iterator
from typing import Any

from sws_export.runtime.contract import Contract
from sws_export.tensors import SIZE_AXES, Shape

_UNLIMITED = sys.maxsize


def _sample_ranges(contract: Contract) -> Iterator[tuple[Shape, Shape]]:
    """Smallest and largest shape of the sample: one pair for each profile, or for the static shapes."""
    for profile in contract.profiles:
        low, _, high = profile["sample"]
        yield low, high
    if not contract.profiles:
        places = {SIZE_AXES[name]: size for name, size in contract.static_sizes.items()}
        fixed = {axis: size for (tensor, axis), size in places.items() if tensor == "sample"}
        yield (
            tuple(fixed.get(axis, 1) for axis in range(4)),
            tuple(fixed.get(axis, _UNLIMITED) for axis in range(4)),
        )


def needed_sides(contract: Contract, height: int, width: int) -> tuple[int, int]:
    """The smallest height and width of a latent that an artefact takes and that contain these.

    If there are none, the next multiples, which the session rejects in pixels.
    """
    multiple = contract.size_multiple
    sides = [-(-side // multiple) * multiple for side in (height, width)]
    found = []
    for low, high in _sample_ranges(contract):
        padded = max(sides[0], low[2]), max(sides[1], low[3])
        if padded[0] <= high[2] and padded[1] <= high[3]:
            found.append(padded)
    return min(found, key=lambda padded: padded[0] * padded[1], default=(sides[0], sides[1]))


def batch_calls(contract: Contract, batch: int, height: int, width: int) -> list[tuple[int, int]]:
    """The calls for a batch of latents of this size: samples of each, and the batch that it is padded to.

    As few calls as possible, of about equal size.
    """
    ranges = [
        (low[0], high[0])
        for low, high in _sample_ranges(contract)
        if low[2] <= height <= high[2] and low[3] <= width <= high[3]
    ]
    # A latent of another size is rejected by the session.
    largest = max((high for _, high in ranges), default=_UNLIMITED)
    calls = -(-batch // largest)
    counts = [batch // calls + (index < batch % calls) for index in range(calls)]
    return [
        (count, min((max(count, low) for low, high in ranges if count <= high), default=count))
        for count in counts
    ]


def rows_of(value: Any, start: int, stop: int, batch: int, size: int) -> Any:
    """Rows `start` to `stop` of an input of `batch` samples, the last one repeated up to `size` rows.

    Inputs without a batch dimension of that length are returned as they are.
    """
    if getattr(value, "ndim", 0) == 0 or len(value) != batch:
        return value
    last = stop - 1
    return value[[*range(start, stop), *[last] * (size - (stop - start))]]

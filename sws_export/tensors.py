"""Names, dtypes, symbolic shapes and size ranges of the inputs and outputs of an exported graph."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sws_export.errors import OptionError

Precision = Literal["fp32", "fp16", "bf16"]

DOWN_RESIDUAL = "down_block_additional_residual_"
"""Prefix of the ControlNet residuals of the down blocks, followed by their index from 0."""
MID_RESIDUAL = "mid_block_additional_residual"

Shape = tuple[int, ...]
ProfileShapes = Mapping[str, tuple[Shape, Shape, Shape]]
"""Smallest, optimal and largest shape of each input, by name."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: Name in the graph, as in diffusers.
        dtype: `float32`, `float16`, `bfloat16` or `int64`.
        shape: An int for a static dimension; otherwise a symbol of `SIZE_AXES`, or an exact division of one
            such as `height/2`. Height and width are those of the latent.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class SizeAxis(NamedTuple):
    """The input and the axis that define a size: `sample` axis 2 is the latent's height."""

    input: str
    axis: int


SIZE_AXES: Mapping[str, SizeAxis] = {
    "batch": SizeAxis("sample", 0),
    "height": SizeAxis("sample", 2),
    "width": SizeAxis("sample", 3),
    "tokens": SizeAxis("encoder_hidden_states", 1),
}
"""The input and axis of each dimension that can be dynamic, by its symbol."""


@dataclass(frozen=True)
class PrecisionFormat:
    """Names of a precision in other formats.

    Attributes:
        dtype: Name in numpy, torch and the manifest.
        safetensors: Name in a safetensors header.
        itemsize: Bytes of one value.
    """

    dtype: str
    safetensors: str
    itemsize: int


PRECISIONS: Mapping[Precision, PrecisionFormat] = {
    "fp32": PrecisionFormat("float32", "F32", 4),
    "fp16": PrecisionFormat("float16", "F16", 2),
    "bf16": PrecisionFormat("bfloat16", "BF16", 2),
}


@dataclass(frozen=True)
class Range:
    """Sizes of one dimension of an engine: it accepts `minimum` to `maximum`, and is tuned for `optimum`."""

    minimum: int
    optimum: int
    maximum: int

    def __str__(self) -> str:
        if self.minimum == self.maximum:
            return str(self.minimum)
        return f"{self.minimum}:{self.optimum}:{self.maximum}"

    def values(self) -> tuple[int, int, int]:
        """Minimum, optimum, maximum."""
        return self.minimum, self.optimum, self.maximum


@dataclass(frozen=True)
class SizeRanges:
    """Sizes of the four dynamic dimensions; height and width are those of the latent, not pixels."""

    batch: Range
    height: Range
    width: Range
    tokens: Range

    def __str__(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in self.ranges().items())

    def ranges(self) -> dict[str, Range]:
        """The ranges by symbol."""
        return {name: getattr(self, name) for name in SIZE_AXES}

    def static_sizes(self) -> dict[str, int]:
        """The ranges of a single size, by symbol."""
        return {name: size.minimum for name, size in self.ranges().items() if size.minimum == size.maximum}


def parse_range(text: str, option: str) -> Range:
    """Parse MIN:OPT:MAX, or one number for a static size; `option` is its name in messages.

    Raises:
        OptionError: The text is neither, a size is below 1, or the three are not in ascending order.
    """
    if not re.fullmatch(r"\d{1,9}(:\d{1,9}:\d{1,9})?", text.strip()):
        raise OptionError(f"{option} {text}: expected one number or MIN:OPT:MAX, such as 1:2:4")
    numbers = [int(part) for part in text.split(":")]
    minimum, optimum, maximum = numbers if len(numbers) == 3 else numbers * 3
    if minimum < 1:
        raise OptionError(f"{option} {text}: sizes start at 1, found {minimum}")
    if not minimum <= optimum <= maximum:
        raise OptionError(
            f"{option} {text}: expected MIN <= OPT <= MAX, found {minimum}, {optimum}, {maximum}"
        )
    return Range(minimum, optimum, maximum)


def latent_range(text: str, option: str, vae_scale: int, multiple: int) -> Range:
    """Parse a size option in pixels, as `parse_range`; the result is in units of the latent.

    Sizes between the multiples that the UNet takes become the next multiple: runtimes pad latents to it.

    Raises:
        OptionError: The text is malformed, or a size is not a multiple of `vae_scale`.
    """
    pixels = parse_range(text, option)
    for size in pixels.values():
        if size % vae_scale:
            nearest = " or ".join(map(str, nearest_multiples(size, vae_scale)))
            raise OptionError(
                f"{option} {text}: {size} pixels is not a multiple of {vae_scale}, the pixels of one latent "
                f"element; the nearest sizes are {nearest} pixels"
            )
    step = vae_scale * multiple
    return Range(*(-(-size // step) * multiple for size in pixels.values()))


def nearest_multiples(size: int, step: int) -> tuple[int, ...]:
    """The multiples of `step` below and above a size that is none; those that are positive."""
    below = size // step * step
    return tuple(multiple for multiple in (below, below + step) if multiple > 0)


def shapes_for(inputs: Iterable[TensorSpec], sizes: SizeRanges) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Smallest, optimal and largest shape of each input.

    Raises:
        OptionError: A size is not divisible as in a dimension such as `height/2`.
    """
    return {
        spec.name: (
            concrete_shape(spec, {name: getattr(sizes, name).minimum for name in SIZE_AXES}),
            concrete_shape(spec, {name: getattr(sizes, name).optimum for name in SIZE_AXES}),
            concrete_shape(spec, {name: getattr(sizes, name).maximum for name in SIZE_AXES}),
        )
        for spec in inputs
    }


def concrete_shape(spec: TensorSpec, sizes: Mapping[str, int]) -> Shape:
    """The shape of `spec` for these sizes of `batch`, `height`, `width` (latent) and `tokens`.

    Raises:
        OptionError: A size is not divisible as in a dimension such as `height/2`.
    """
    return tuple(
        dimension if isinstance(dimension, int) else _dimension(spec, dimension, sizes)
        for dimension in spec.shape
    )


def _dimension(spec: TensorSpec, dimension: str, sizes: Mapping[str, int]) -> int:
    name, _, divisor = dimension.partition("/")
    size, rest = divmod(sizes[name], int(divisor or 1))
    if rest:
        raise OptionError(
            f"input {spec.name} needs a latent {name} that is a multiple of {divisor}, found {sizes[name]}"
        )
    return size

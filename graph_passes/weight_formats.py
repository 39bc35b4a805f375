"""The 8-bit formats of weights; imports nothing, because options name them."""

from typing import Literal, get_args

WeightFormat = Literal["int8", "fp8"]
"""`fp8` is float8 with 4 bits of exponent and 3 of mantissa, without infinities (`FLOAT8E4M3FN` of ONNX)."""

WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
"""All formats."""

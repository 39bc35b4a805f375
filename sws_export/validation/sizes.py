"""Sizes of the short sampling run of validation and calibration."""

TOKENS = 19
"""More than twice the radius of the transport, so that some state entries point outside the text."""
FLOAT64_PARAMETERS = 200_000_000
"""The reference computes in float64 up to this many parameters; above, float32 keeps the time to minutes."""


def validation_sizes(size_multiple: int, parameter_count: int) -> dict[str, int]:
    """Sizes of a non-square latent, smaller for large models to keep the time to minutes.

    Args:
        size_multiple: Height and width of the latent must be multiples of it.
        parameter_count: Number of parameters of the UNet.
    """
    rows, columns = (4, 3) if parameter_count <= FLOAT64_PARAMETERS else (3, 2)
    return {"batch": 2, "height": rows * size_multiple, "width": columns * size_multiple, "tokens": TOKENS}

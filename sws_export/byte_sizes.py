"""Numbers of bytes as text, in decimal units."""

import re

from sws_export.errors import OptionError

_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def format_bytes(size: int) -> str:
    """`size` in GB, or in MB below one GB, with two decimals."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def parse_bytes(text: str, given: str) -> int:
    """The number of bytes that `text` gives, such as `500MB` or `1.5 GB`; without a unit, bytes.

    Args:
        text: The size.
        given: The option or variable with its value, for the message.

    Raises:
        OptionError: It is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT]B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise OptionError(f"{given}: expected a size such as 500MB or 20GB")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])

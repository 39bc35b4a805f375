"""The orthonormal basis with which the ComfyUI node projects queries or keys to a common width."""

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_WIDE_FACTOR = 1_000_003
_NARROW_FACTOR = 9176


@functools.cache
def orthonormal_basis(wide: int, narrow: int) -> "Tensor":
    """Q of the reduced QR decomposition of a standard normal matrix, seeded by the two widths.

    Args:
        wide: The larger width.
        narrow: The smaller width.

    Returns:
        [wide, narrow], float32, on the CPU, with orthonormal columns. The tensor is cached and shared: do not
        modify it.
    """
    import torch

    generator = torch.Generator("cpu").manual_seed(wide * _WIDE_FACTOR + narrow * _NARROW_FACTOR)
    normal = torch.randn(wide, narrow, generator=generator, dtype=torch.float32)
    basis: Tensor = torch.linalg.qr(normal, mode="reduced")[0]
    return basis

"""Sizes of latents in pixels, for messages."""

from sws_export.runtime.contract import Contract
from sws_export.tensors import nearest_multiples


def with_pixels(contract: Contract, side: int) -> str:
    """A height or width of the latent, with the pixels if the manifest has the scale: `136 (1088 pixels)`."""
    scale = contract.manifest["source"].get("vae_scale")
    return f"{side} ({side * scale} pixels)" if scale and scale > 1 else str(side)


def nearest_sizes(contract: Contract, side: int, multiple: int) -> str:
    """The multiples below and above a height or width of the latent."""
    return " and ".join(with_pixels(contract, size) for size in nearest_multiples(side, multiple))

"""Sigma-Weighted Shuffle in eager torch: slow, obvious, dense; what every exported graph is compared with.

One function a formula of the method, batched, each sample on its own. The noise schedule is in
`noise_schedule`, the transports and their banded layout in `transport`, one attention site in `attention`,
a live diffusers UNet in `unet`.
"""

from sws_export.reference.attention import SiteResult, attention_site, kl_divergence, largest_mixing
from sws_export.reference.noise_schedule import Schedule, blend_weights, schedule
from sws_export.reference.transport import (
    band_from_dense,
    blended_transport,
    dense_from_band,
    momentum,
    rebalance,
    scale_transport,
)
from sws_export.reference.unet import ReferenceUNet, Site, self_attention_sites

__all__ = [
    "ReferenceUNet",
    "Schedule",
    "Site",
    "SiteResult",
    "attention_site",
    "band_from_dense",
    "blend_weights",
    "blended_transport",
    "dense_from_band",
    "kl_divergence",
    "largest_mixing",
    "momentum",
    "rebalance",
    "scale_transport",
    "schedule",
    "self_attention_sites",
]

"""Sigma-Weighted Shuffle in eager torch: slow, obvious, dense; what every exported graph is compared with.

One function a formula of the method, batched, each sample on its own. The noise schedule is in
`noise_schedule`, the transports and their banded layout in `transport`, one attention site in `attention`,
a live diffusers UNet in `unet`. What the published node computes instead is in `node_guard`,
`node_transport` and `node_unet`.
"""

from sws_export.reference.attention import SiteResult, attention_site, kl_divergence, largest_mixing
from sws_export.reference.comfyui_node_guard import (
    ComfyUINodeSchedule,
    NodeResult,
    comfyui_node_schedule,
    node_patch,
)
from sws_export.reference.comfyui_node_transport import (
    fresh_transport,
    moving_average,
    text_grid,
    transport_radius,
)
from sws_export.reference.comfyui_node_unet import ComfyUINodeReferenceUNet, node_sites
from sws_export.reference.noise_schedule import Schedule, blend_weights, schedule
from sws_export.reference.presets import reference_unet
from sws_export.reference.transport import (
    band_from_dense,
    blended_transport,
    dense_from_band,
    momentum,
    rebalance,
    scale_transport,
)
from sws_export.reference.unet import ReferenceUNet, Site, attention_sites, self_attention_sites

__all__ = [
    "ComfyUINodeReferenceUNet",
    "ComfyUINodeSchedule",
    "NodeResult",
    "ReferenceUNet",
    "Schedule",
    "Site",
    "SiteResult",
    "attention_site",
    "attention_sites",
    "band_from_dense",
    "blend_weights",
    "blended_transport",
    "comfyui_node_schedule",
    "dense_from_band",
    "fresh_transport",
    "kl_divergence",
    "largest_mixing",
    "momentum",
    "moving_average",
    "node_patch",
    "node_sites",
    "rebalance",
    "reference_unet",
    "scale_transport",
    "schedule",
    "self_attention_sites",
    "text_grid",
    "transport_radius",
]

"""Eager PyTorch reference of Sigma-Weighted Shuffle, which every exported graph is compared with.

Written for readability, with dense matrices: one function for each formula of the method, batched, with
independent samples. The noise schedule is in `noise_schedule`, the transports and their banded layout in
`transport`, one attention site in `attention`, and a diffusers UNet with SWS in `unet`. The published ComfyUI
node is in `comfyui_node_guard`, `comfyui_node_transport` and `comfyui_node_unet`.
"""

from sws_export.reference.attention import (
    SiteResult,
    attention_site,
    entropy_factor,
    kl_divergence,
    largest_mixing,
)
from sws_export.reference.comfyui_node_guard import (
    ComfyUINodeResult,
    ComfyUINodeSchedule,
    comfyui_node_call_schedule,
    comfyui_node_patch,
    comfyui_node_schedule,
)
from sws_export.reference.comfyui_node_transport import (
    fresh_transport,
    moving_average,
    text_grid,
    transport_radius,
)
from sws_export.reference.comfyui_node_unet import ComfyUINodeReferenceUNet, comfyui_node_sites
from sws_export.reference.noise_schedule import Schedule, blend_weights, schedule
from sws_export.reference.transport import (
    SUM_FLOOR,
    band_from_dense,
    blended_transport,
    dense_from_band,
    momentum,
    rebalance,
    scale_transport,
)
from sws_export.reference.unet import ReferenceSite, ReferenceUNet, attention_sites, self_attention_sites

__all__ = [
    "SUM_FLOOR",
    "ComfyUINodeReferenceUNet",
    "ComfyUINodeResult",
    "ComfyUINodeSchedule",
    "ReferenceSite",
    "ReferenceUNet",
    "Schedule",
    "SiteResult",
    "attention_site",
    "attention_sites",
    "band_from_dense",
    "blend_weights",
    "blended_transport",
    "comfyui_node_call_schedule",
    "comfyui_node_patch",
    "comfyui_node_schedule",
    "comfyui_node_sites",
    "dense_from_band",
    "entropy_factor",
    "fresh_transport",
    "kl_divergence",
    "largest_mixing",
    "momentum",
    "moving_average",
    "rebalance",
    "scale_transport",
    "schedule",
    "self_attention_sites",
    "text_grid",
    "transport_radius",
]

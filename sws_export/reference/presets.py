"""The reference of each preset."""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from graph_passes.parameters import SwsParameters
from sws_export.parameters import Preset
from sws_export.reference.comfyui_node_unet import ComfyUINodeReferenceUNet
from sws_export.reference.unet import ReferenceUNet

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def reference_unet(
    preset: Preset,
    unet: "UNet2DConditionModel",
    parameters: SwsParameters,
    sites: Callable[[str], bool] | Collection[str] | None = None,
) -> ReferenceUNet | ComfyUINodeReferenceUNet:
    """What graphs of `preset` are compared with; arguments and errors are those of the classes."""
    kind = ComfyUINodeReferenceUNet if preset == "node" else ReferenceUNet
    return kind(unet, parameters, sites)

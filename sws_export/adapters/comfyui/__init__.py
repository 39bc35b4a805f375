"""Exported UNets in ComfyUI: what the node package in integrations/comfyui/ is made of.

ComfyUI is not imported here, and torch only for tensors that ComfyUI passes: the nodes import ComfyUI.
"""

from sws_export.adapters.comfyui.engine import Engine
from sws_export.adapters.comfyui.family import Sampling, family_of, sampling_of, unet_config
from sws_export.adapters.comfyui.inputs import embed_sizes, split_adm
from sws_export.adapters.comfyui.model import INTENSITY_OPTION, SwsDiffusionModel

__all__ = [
    "INTENSITY_OPTION",
    "Engine",
    "Sampling",
    "SwsDiffusionModel",
    "embed_sizes",
    "family_of",
    "sampling_of",
    "split_adm",
    "unet_config",
]

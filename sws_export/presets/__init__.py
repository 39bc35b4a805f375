"""The presets: methods that can be inserted into a UNet graph.

To add one, write a module with a subclass of `Preset` and register it here.
"""

from collections.abc import Mapping

from sws_export.errors import OptionError
from sws_export.presets.comfyui_node import ComfyUINodePreset
from sws_export.presets.preset import Preset
from sws_export.presets.sws import SwsPreset

__all__ = ["DEFAULT_PRESET", "PRESETS", "Preset", "preset_named"]

DEFAULT_PRESET = SwsPreset()

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in (DEFAULT_PRESET, ComfyUINodePreset())}
"""All presets by name."""


def preset_named(name: str) -> Preset:
    """The preset with this name or alias.

    Raises:
        OptionError: There is none.
    """
    for preset in PRESETS.values():
        if name in (preset.name, *preset.aliases):
            return preset
    raise OptionError(f"--preset {name} is unknown; choose {' or '.join(PRESETS)}")

"""The presets: methods that can be inserted into a UNet graph.

To add one, write a module with a subclass of `Preset` and register it here.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sws_export.errors import OptionError
from sws_export.presets.comfyui_node import ComfyUINodePreset
from sws_export.presets.preset import Preset
from sws_export.presets.sws import SwsPreset

if TYPE_CHECKING:
    from sws_export.manifest import GraphDescription

__all__ = ["DEFAULT_PRESET", "PRESETS", "Preset", "preset_named", "recorded_preset"]

DEFAULT_PRESET = SwsPreset()

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in (DEFAULT_PRESET, ComfyUINodePreset())}
"""All presets by name, each with its default source of u."""


def preset_named(name: str, u: str | None = None) -> Preset:
    """The preset with this name or alias.

    Args:
        name: Of a preset.
        u: Where its u comes from; None for the default of the preset.

    Raises:
        OptionError: There is none, or it does not have this source of u.
    """
    for preset in PRESETS.values():
        if name in (preset.name, *preset.aliases):
            return preset if u is None else preset.with_u(u)
    raise OptionError(f"--preset {name} is unknown; choose {' or '.join(PRESETS)}")


def recorded_preset(description: "GraphDescription") -> Preset | None:
    """The preset in a graph, from its manifest; None for a plain export."""
    name = description["preset"]
    if name is None:
        return None
    preset = preset_named(name)
    u = "calls" if any(state["input"] == "calls" for state in description["states"]) else "sigma"
    return preset if preset.u == u else preset.with_u(u)

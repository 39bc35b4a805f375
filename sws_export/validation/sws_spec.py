"""The SWS configuration of a graph, as validation needs it."""

import dataclasses
from fractions import Fraction

from graph_passes.parameters import SwsParameters
from graph_passes.weight_formats import WeightFormat
from sws_export.presets import DEFAULT_PRESET, Preset


@dataclasses.dataclass(frozen=True)
class SwsSpec:
    """The SWS configuration of a graph.

    Attributes:
        parameters: The parameters that the graph was exported with.
        sites: Paths of the attention modules with SWS; empty for a plain graph.
        guard_rows: Fraction of the query rows that the key guard evaluates.
        debug_sites: Columns of the debug outputs; empty for a graph without debug outputs.
        preset: Preset that the graph was exported with.
        weights: Format of its 8-bit weights; None without.
        activations: Format of its 8-bit activations; None without.
    """

    parameters: SwsParameters
    sites: tuple[str, ...]
    guard_rows: Fraction = Fraction(1)
    debug_sites: tuple[str, ...] = ()
    preset: Preset = DEFAULT_PRESET
    weights: WeightFormat | None = None
    activations: WeightFormat | None = None

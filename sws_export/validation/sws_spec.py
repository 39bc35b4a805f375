"""The SWS configuration of a graph, as validation needs it."""

import dataclasses

from graph_passes.guard import GuardOptions
from graph_passes.parameters import SwsParameters
from graph_passes.weight_formats import WeightFormat
from sws_export.manifest import GraphDescription
from sws_export.parameters import recorded_parameters
from sws_export.presets import DEFAULT_PRESET, Preset, recorded_preset


@dataclasses.dataclass(frozen=True)
class SwsSpec:
    """The SWS configuration of a graph.

    Attributes:
        parameters: The parameters that the graph was exported with.
        sites: Paths of the attention modules with SWS; empty for a plain graph.
        guard: How the key guard is computed.
        debug_sites: Columns of the debug outputs; empty for a graph without debug outputs.
        preset: Preset that the graph was exported with.
        weights: Format of its 8-bit weights; None without.
        activations: Format of its 8-bit activations; None without.
    """

    parameters: SwsParameters
    sites: tuple[str, ...]
    guard: GuardOptions = dataclasses.field(default_factory=GuardOptions)
    debug_sites: tuple[str, ...] = ()
    preset: Preset = DEFAULT_PRESET
    weights: WeightFormat | None = None
    activations: WeightFormat | None = None

    @classmethod
    def from_manifest(cls, description: GraphDescription) -> "SwsSpec":
        """The configuration of the graph that a manifest describes."""
        quantization = description.get("quantization")
        weights = quantization["weights"] if quantization else None
        activations = quantization.get("activations") if quantization else None
        preset = recorded_preset(description)
        if description["sws"] is None or preset is None:
            return cls(SwsParameters(), (), weights=weights, activations=activations)
        guard, debug = description["guard"], description["debug_outputs"]
        return cls(
            recorded_parameters(description["sws"]),
            tuple(name for names in description["sites"].values() for name in names),
            GuardOptions.parse(guard["form"], guard["rows"]) if guard else GuardOptions(),
            tuple(debug["sites"]) if debug else (),
            preset,
            weights,
            activations,
        )

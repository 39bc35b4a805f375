"""The preset `comfyui-node`: what the published ComfyUI node computes."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast, get_args

from graph_passes.guard import GuardOptions
from graph_passes.parameters import SwsParameters
from sws_export.errors import ExportError, OptionError
from sws_export.presets.preset import Preset, ReferenceModel, USource

if TYPE_CHECKING:
    import onnx_ir as ir
    from diffusers import UNet2DConditionModel

    from graph_passes.find_sites import Site, SkippedSite
    from graph_passes.insert_comfyui_node import InsertComfyUINode
    from graph_passes.insert_sws import StatePair
    from graph_passes.target import Target
    from sws_export.presets.preset import Floats

_PATCHED = ".attn2"
_NOT_PATCHED = ".attn1"
_UNUSED = {
    "scales": "the node has one radius",
    "schedule": "the node's u is the remaining noise, always",
}


class ComfyUINodePreset(Preset):
    """Cross-attention to the text; one persistent state and one schedule for the whole batch.

    Attributes:
        u: `calls`, as the node runs in ComfyUI, which gives it no noise level that it can use; or `sigma`,
            what it would compute with the noise level as an input.
    """

    name = "comfyui-node"
    aliases = ("node",)
    summary = "what the published ComfyUI node computes"
    fixed_guard = "its guard has one form, which stores the few logits of the text and evaluates all rows"
    plain_at_zero = False
    persistent_state = True
    reset_rule = (
        "never; all sites share it, across the batch and from image to image; feed zeros to start over"
    )

    def __init__(self, u: USource = "calls") -> None:
        """The preset with a source of u."""
        self.u = u
        self.unused_parameters = dict(_UNUSED)
        self.shared_inputs = ("intensity",)
        if u == "sigma":
            self.shared_inputs = ("sigma", "intensity")
        else:
            reason = "with --u calls the node's u is a counter of its calls"
            self.unused_parameters |= {"sigma_min": reason, "sigma_max": reason}

    def with_u(self, u: str) -> "ComfyUINodePreset":
        """See `Preset.with_u`."""
        if u not in get_args(USource):
            raise OptionError(f"--u {u} is unknown; choose {' or '.join(get_args(USource))}")
        return ComfyUINodePreset(cast(USource, u))

    def extra_states(self) -> "Sequence[StatePair]":
        """The counter of calls."""
        from graph_passes.insert_sws import CALLS

        return (CALLS,) if self.u == "calls" else ()

    def candidate_sites(
        self, model: "ir.Model", patterns: Sequence[str]
    ) -> "tuple[list[Site], list[SkippedSite]]":
        """The cross-attention sites that the node patches.

        Raises:
            ExportError: The node would patch a site that has no supported form. Each site updates the state,
                so leaving one out changes all that follow.
        """
        from graph_passes.find_sites import SkippedSite, find_sites
        from graph_passes.grids import TEXT

        found, skipped = find_sites(model, cross_attention=True)
        for site in skipped:
            wanted = not patterns or any(fnmatch.fnmatchcase(site.name, pattern) for pattern in patterns)
            if wanted and not site.name.endswith(_NOT_PATCHED):
                raise ExportError(
                    f"--preset {self.name} cannot take the attention site {site.name}: {site.reason}; export "
                    "the checkpoint with sws-export, or choose the sites that it can take with --sites"
                )
        sites = [site for site in found if site.key_grid == TEXT and site.name.endswith(_PATCHED)]
        others = [site for site in found if site not in sites]
        reason = "the node leaves self-attention alone"
        return sites, [*skipped, *(SkippedSite(site.name, reason) for site in others)]

    def insertion(
        self,
        sites: "Sequence[Site]",
        parameters: SwsParameters,
        guard: GuardOptions,
        target: "Target",
        *,
        debug_outputs: bool = False,
    ) -> "InsertComfyUINode":
        """See `InsertComfyUINode`; the orthonormal bases that `sites` need are computed here."""
        from graph_passes.insert_comfyui_node import InsertComfyUINode, basis_widths
        from sws_export.reference.orthonormal_basis import orthonormal_basis

        del guard, target
        bases = {widths: orthonormal_basis(*widths).numpy() for widths in sorted(basis_widths(sites))}
        return InsertComfyUINode(
            sites, parameters, bases, count_calls=self.u == "calls", debug_outputs=debug_outputs
        )

    def reference_unet(
        self,
        unet: "UNet2DConditionModel",
        parameters: SwsParameters,
        sites: Sequence[str],
        kl_strides: tuple[int, int] = (1, 1),
    ) -> ReferenceModel:
        """See `ComfyUINodeReferenceUNet`."""
        from sws_export.reference import ComfyUINodeReferenceUNet

        del kl_strides
        return ComfyUINodeReferenceUNet(unet, parameters, sites, u=self.u)

    def bypass_sigma(self, parameters: SwsParameters) -> float | None:
        """sigma_max: the temperature does not depend on the intensity, and is 1 there and above.

        None with `calls`: u never reaches 1.
        """
        return parameters.sigma_max if self.u == "sigma" else None

    def schedule(
        self,
        sigma: "Floats",
        intensity: float,
        parameters: SwsParameters,
        states: "Mapping[str, Floats]",
    ) -> tuple[float, float]:
        """The node's u, and the KL budget; with `calls` those of the first site, whose count is 1 more."""
        import torch

        from sws_export.reference import comfyui_node_call_schedule, comfyui_node_schedule

        del intensity
        if self.u == "calls":
            calls = states.get("calls")
            count = 0.0 if calls is None else float(calls[0])
            step = comfyui_node_call_schedule(torch.tensor([count + 1.0]), parameters)
        else:
            step = comfyui_node_schedule(torch.from_numpy(sigma), parameters)
        return float(step.u[0]), float(step.kappa[0])

    def banded_state(self, state: "Floats") -> "Floats":
        """The state [1, n, n] is dense and that of the whole batch."""
        import numpy as np
        import torch

        from sws_export.reference import band_from_dense, text_grid

        band = band_from_dense(torch.from_numpy(state), *text_grid(state.shape[1]))
        return np.asarray(band[0].numpy(), np.float32)

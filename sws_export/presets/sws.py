"""The preset `sws`: Sigma-Weighted Shuffle as docs/method.md describes it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from graph_passes.guard import GuardOptions
from graph_passes.parameters import SwsParameters
from sws_export.presets.preset import Preset, ReferenceModel

if TYPE_CHECKING:
    import onnx_ir as ir
    from diffusers import UNet2DConditionModel

    from graph_passes.find_sites import Site, SkippedSite
    from graph_passes.insert_sws import InsertSws
    from graph_passes.target import Target
    from sws_export.presets.preset import Floats


class SwsPreset(Preset):
    """Self-attention by default, any site by pattern; samples are independent; states reset per image."""

    name = "sws"
    summary = "the method as docs/method.md describes it"

    def candidate_sites(
        self, model: "ir.Model", patterns: Sequence[str]
    ) -> "tuple[list[Site], list[SkippedSite]]":
        """All self-attention; with patterns also cross-attention to the text."""
        from graph_passes.find_sites import find_sites

        return find_sites(model, cross_attention=bool(patterns))

    def insertion(
        self,
        sites: "Sequence[Site]",
        parameters: SwsParameters,
        guard: GuardOptions,
        target: "Target",
        *,
        debug_outputs: bool = False,
    ) -> "InsertSws":
        """See `InsertSws`."""
        from graph_passes.insert_sws import InsertSws

        return InsertSws(sites, parameters, target, guard, debug_outputs=debug_outputs)

    def reference_unet(
        self,
        unet: "UNet2DConditionModel",
        parameters: SwsParameters,
        sites: Sequence[str],
        kl_strides: tuple[int, int] = (1, 1),
    ) -> ReferenceModel:
        """See `ReferenceUNet`."""
        from sws_export.reference import ReferenceUNet

        return ReferenceUNet(unet, parameters, sites, kl_strides)

    def schedule(
        self,
        sigma: "Floats",
        intensity: float,
        parameters: SwsParameters,
        states: "Mapping[str, Floats]",
    ) -> tuple[float, float]:
        """Progress u and the KL budget."""
        import torch

        from sws_export.reference import schedule

        del states
        noise = torch.from_numpy(sigma)
        step = schedule(noise, torch.full_like(noise, intensity), parameters)
        return float(step.u[0]), float(step.kappa[0])

    def banded_state(self, state: "Floats") -> "Floats":
        """The state [B, 145, H, W] holds bands already."""
        import numpy as np

        return np.asarray(state[0], np.float32)

"""Run the eager reference on NumPy arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from graph_passes.debug_outputs import KL_CAP, PREFIX, SITE_METRICS
from sws_export.checkpoint import Checkpoint, FusedWeights
from sws_export.validation.sws_spec import SwsSpec
from sws_export.validation.trajectory import Array


class ReferenceRunner:
    """The eager UNet with SWS, with the state fed back from step to step."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        fused: FusedWeights | None,
        sws_spec: SwsSpec,
        intensity: Array,
        *,
        float64: bool,
    ) -> None:
        """Load the UNet.

        Args:
            checkpoint: Architecture and weights.
            fused: Weights that replace those of the checkpoint, such as weights with fused LoRAs.
            sws_spec: The SWS configuration; without sites, the plain UNet is run.
            intensity: Strength of SWS for each sample, [B].
            float64: Compute in float64 instead of float32.
        """
        import torch

        from sws_export.checkpoint.unet_module import stream_unet

        self._dtype = torch.float64 if float64 else torch.float32
        self._unet = stream_unet(checkpoint, self._dtype, fused)
        self._sws_unet = (
            sws_spec.preset.reference_unet(
                self._unet, sws_spec.parameters, sws_spec.sites, sws_spec.guard.kl_strides
            )
            if sws_spec.sites
            else None
        )
        self._intensity = torch.from_numpy(np.asarray(intensity)).to(self._dtype)
        self._debug_sites = sws_spec.debug_sites
        self._state: dict[str, Any] | None = None

    def step(self, inputs: Mapping[str, Array], sigma: Array) -> dict[str, Array]:
        """Run one step and keep the new state.

        Args:
            inputs: Inputs of the UNet by name.
            sigma: Noise levels, [B].

        Returns:
            Prediction, states and debug outputs, under the names of the graph outputs.
        """
        import torch

        from sws_export.checkpoint.unet_module import call_unet, unet_arguments

        tensors = {
            name: torch.from_numpy(values).to(self._dtype if values.dtype.kind == "f" else torch.int64)
            for name, values in inputs.items()
        }
        if self._sws_unet is None:
            with torch.no_grad():
                return {"out_sample": call_unet(self._unet, tensors).numpy()}
        out, self._state = self._sws_unet.step(
            **unet_arguments(tensors),
            sigma=torch.from_numpy(sigma).to(self._dtype),
            intensity=self._intensity,
            state=self._state,
        )
        states = {f"{name}_out": value.numpy() for name, value in self._state.items()}
        return {"out_sample": out.numpy(), **states, **self._debug_outputs(len(sigma))}

    def _debug_outputs(self, batch: int) -> dict[str, Array]:
        """Expected values of the debug outputs by name: [B, sites], and [B] for the KL budget."""
        if not self._debug_sites:
            return {}
        import torch

        assert self._sws_unet is not None
        results = [self._sws_unet.records[site] for site in self._debug_sites]
        metrics = {
            f"{PREFIX}{metric}": torch.stack([getattr(result, metric) for result in results], dim=1).numpy()
            for metric in SITE_METRICS
        }
        return metrics | {KL_CAP: self._sws_unet.schedule.kappa.expand(batch).numpy()}

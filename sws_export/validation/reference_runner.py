"""The eager reference, fed with arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graph_passes.debug_outputs import KL_CAP, PREFIX, SITE_METRICS
from graph_passes.parameters import SwsParameters
from sws_export.checkpoint import Checkpoint, FusedWeights
from sws_export.parameters import Preset
from sws_export.validation.trajectory import Array


class ReferenceRunner:
    """The eager UNet with SWS, fed with arrays."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        fused: FusedWeights | None,
        parameters: SwsParameters,
        sites: Sequence[str],
        double: bool,
        intensity: Array,
        debug_sites: Sequence[str] = (),
        preset: Preset = "sws",
    ) -> None:
        import torch

        from sws_export.checkpoint.unet_module import stream_unet
        from sws_export.reference import reference_unet

        self._dtype = torch.float64 if double else torch.float32
        self._unet = stream_unet(checkpoint, self._dtype, fused)
        self._shuffled = reference_unet(preset, self._unet, parameters, sites) if sites else None
        self._intensity = torch.from_numpy(np.asarray(intensity)).to(self._dtype)
        self._debug_sites = debug_sites
        self._state: dict[str, Any] | None = None

    def step(self, inputs: Mapping[str, Array], sigma: Array) -> dict[str, Array]:
        """One step; the state is fed back, and returned under the names of the graph's outputs."""
        import torch

        from sws_export.checkpoint.unet_module import call_unet, unet_arguments

        tensors = {
            name: torch.from_numpy(values).to(self._dtype if values.dtype.kind == "f" else torch.int64)
            for name, values in inputs.items()
        }
        if self._shuffled is None:
            with torch.no_grad():
                return {"out_sample": call_unet(self._unet, tensors).numpy()}
        out, self._state = self._shuffled.step(
            **unet_arguments(tensors),
            sigma=torch.from_numpy(sigma).to(self._dtype),
            intensity=self._intensity,
            state=self._state,
        )
        outputs = {f"{name}_out": value.numpy() for name, value in self._state.items()}
        return {"out_sample": out.numpy(), **outputs, **self._debug_outputs(len(sigma))}

    def _debug_outputs(self, batch: int) -> dict[str, Array]:
        """What the debug outputs of the graph hold, by their names."""
        if not self._debug_sites:
            return {}
        import torch

        assert self._shuffled is not None
        records = [self._shuffled.records[site] for site in self._debug_sites]
        figures = {
            f"{PREFIX}{figure}": torch.stack([getattr(record, figure) for record in records], dim=1).numpy()
            for figure in SITE_METRICS
        }
        return figures | {KL_CAP: self._shuffled.schedule.kappa.expand(batch).numpy()}

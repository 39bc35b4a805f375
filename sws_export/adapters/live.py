"""SWS in a torch UNet that ComfyUI runs: patches of its self-attention, for tuning before an export.

ComfyUI is not imported here. The node in integrations/comfyui/ installs `LiveShuffle.call_unet` as a wrapper
of the diffusion model and `self_attention` as the replacement of every attn1.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graph_passes.parameters import SwsParameters
from sws_export.adapters.comfyui.conditions import Row
from sws_export.adapters.comfyui.model import rows_of_call
from sws_export.adapters.live_attention import Levels, plain_attention, shuffled_attention
from sws_export.adapters.live_transport import Transport
from sws_export.reference import schedule

STEP_OPTION = "sws_live_step"
"""Entry of `transformer_options` with the `LiveStep` of the call."""

Grid = tuple[int, int]


class LiveShuffle:
    """The transports of the conditions of a sampling run.

    Attributes:
        intensity: Strength in [0, 1]; at 0 the UNet computes what it computes without SWS.
        parameters: Constants of the method.
    """

    def __init__(self, intensity: float, parameters: SwsParameters | None = None) -> None:
        self.intensity = intensity
        self.parameters = parameters or SwsParameters()
        self.transports: dict[tuple[Row, Grid], Transport] = {}

    def clear(self) -> None:
        """Start a run: every transport is without history."""
        self.transports.clear()

    def call_unet(
        self,
        unet: Callable[..., Tensor],
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> Tensor:
        """Call the UNet with the step of this call in its options; as a wrapper of ComfyUI."""
        options = dict(transformer_options or {})
        if self.intensity > 0 and "sigmas" in options:
            sigmas = options["sigmas"].float().cpu().tolist()
            rows = rows_of_call(options, len(x))
            options[STEP_OPTION] = LiveStep(self, rows, sigmas * (len(x) // len(sigmas)), x)
        return unet(x, timesteps, context, y, control, options, **others)


class LiveStep:
    """One call of the UNet: its noise levels, and the transport of each grid."""

    def __init__(self, shuffle: LiveShuffle, rows: Sequence[Row], sigmas: Sequence[float], x: Tensor) -> None:
        self.parameters = shuffle.parameters
        self._shuffle, self._rows = shuffle, rows
        self._height, self._width = x.shape[2:4]
        # The last noise level of a run may be 0, and a logarithm is taken.
        noise = torch.tensor(sigmas, dtype=torch.float64).clamp(min=0)
        self._schedule = schedule(noise, torch.full_like(noise, shuffle.intensity), shuffle.parameters)
        self.levels = Levels.of(self._schedule, shuffle.intensity, x.device, shuffle.parameters)
        self._grids: dict[Grid, _BatchTransports] = {}

    def transports(self, tokens: int, device: torch.device) -> "_BatchTransports | None":
        """The transports of the samples on the grid with so many tokens; None if no grid has as many."""
        grid = _grid(self._height, self._width, tokens)
        if grid is None:
            return None
        if grid not in self._grids:
            self._grids[grid] = self._next(grid, device)
        return self._grids[grid]

    def _next(self, grid: Grid, device: torch.device) -> "_BatchTransports":
        """Advance the transports of a grid. Conditions with the same history share one."""
        made: dict[tuple[int, float], tuple[Transport, list[int]]] = {}
        for index, (row, u) in enumerate(zip(self._rows, self._schedule.u.tolist(), strict=True)):
            previous = self._shuffle.transports.get((row, grid))
            key = (id(previous), u)
            if key not in made:
                blend = self._schedule.blend[index]
                made[key] = (Transport.of_step(previous, blend, *grid, device, self.parameters), [])
            made[key][1].append(index)
        for transport, indices in made.values():
            for index in indices:
                self._shuffle.transports[self._rows[index], grid] = transport
        return _BatchTransports(list(made.values()))


class _BatchTransports:
    """Transports of the samples of a batch; see `Transports`."""

    def __init__(self, groups: Sequence[tuple[Transport, list[int]]]) -> None:
        self._groups = groups

    def apply(self, x: Tensor) -> Tensor:
        if len(self._groups) == 1:
            return self._groups[0][0].apply(x)
        out = torch.empty_like(x)
        for transport, indices in self._groups:
            out[indices] = transport.apply(x[indices])
        return out


def self_attention(q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor:
    """An attn1 with SWS, as a replacement that ComfyUI calls after the projections.

    Args:
        q: Queries, [B, T, C].
        k: Keys, [B, L, C].
        v: Values, [B, L, C].
        options: `n_heads`, and the `LiveStep`; without it, and for keys that are not on a grid of the latent,
            the attention is the plain one.

    Returns:
        [B, T, C].
    """
    step: LiveStep | None = options.get(STEP_OPTION)
    heads = options["n_heads"]
    transports = step.transports(k.shape[1], k.device) if step is not None and k.shape == q.shape else None
    if step is None or transports is None:
        return plain_attention(q, k, v, heads)
    return shuffled_attention(q, k, v, heads, transports, step.levels, step.parameters)


def _grid(height: int, width: int, tokens: int) -> Grid | None:
    """Rows and columns of the grid of a latent, downsampled by a power of 2, that has so many tokens."""
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    return (height, width) if height * width == tokens else None

"""A diffusers UNet with the cross-attention patch of the ComfyUI node, through attention processors."""

import dataclasses
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from graph_passes.parameters import SwsParameters
from sws_export.errors import ExportError
from sws_export.reference.attention import SiteResult
from sws_export.reference.comfyui_node_guard import (
    CALL_CYCLE,
    ComfyUINodeSchedule,
    comfyui_node_call_schedule,
    comfyui_node_patch,
    comfyui_node_schedule,
)
from sws_export.reference.comfyui_node_transport import fresh_transport
from sws_export.reference.unet import chosen_paths, installed

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

COMFYUI_NODE_STATE = "sws_state_text"
CALLS_STATE = "calls"


def comfyui_node_sites(unet: "UNet2DConditionModel") -> list[str]:
    """Paths of the cross-attention modules that the node patches, in module order."""
    from diffusers.models.attention_processor import Attention

    return [
        path
        for path, module in unet.named_modules()
        if isinstance(module, Attention) and path.endswith(".attn2") and module.is_cross_attention
    ]


class ComfyUINodeReferenceUNet:
    """A UNet with the cross-attention patch of the ComfyUI node; one sampling step for each call.

    The attention processors of the UNet are restored after each step.

    Attributes:
        sites: Paths of the attention modules that are patched.
        records: Results of the sites in the last step, by path, in order of execution. Scalars are shared
            across the batch and have the same value for each sample.
        schedule: Schedule of the last step, of its first site.
    """

    sites: list[str]
    records: dict[str, SiteResult]
    schedule: ComfyUINodeSchedule

    def __init__(
        self,
        unet: "UNet2DConditionModel",
        parameters: SwsParameters,
        sites: Callable[[str], bool] | Collection[str] | None = None,
        *,
        u: Literal["sigma", "calls"] = "sigma",
    ) -> None:
        """Choose the sites of a UNet.

        Args:
            unet: The UNet in evaluation mode, in any float dtype.
            parameters: Parameters of the method; `schedule` and `scales` are not used.
            sites: Paths of attention modules, or a predicate of a path; None selects all cross-attention.
            u: Compute the schedule from sigma, or count the calls of the sites, as the node does in ComfyUI.

        Raises:
            ExportError: A path is not a cross-attention module of the UNet, or no site is selected.
        """
        self.sites = chosen_paths(comfyui_node_sites(unet), sites, "cross-attention")
        self.records = {}
        self._unet = unet
        self._parameters = parameters
        self._state_names = {COMFYUI_NODE_STATE} | ({CALLS_STATE} if u == "calls" else set())

    @torch.no_grad()
    def step(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        sigma: Tensor,
        intensity: Tensor,
        state: dict[str, Tensor] | None = None,
        **unet_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One call of the UNet.

        Args:
            sample: Latents, [B, C, Hl, Wl], in the dtype of the UNet.
            timestep: Timesteps, [B].
            encoder_hidden_states: Text embeddings, [B, n, X], in the dtype of the UNet.
            sigma: Noise levels, [B]; the first one is used for the whole batch, or none if calls are counted.
            intensity: Strengths in [0, 1], [B]; the first one is used for the whole batch.
            state: State returned by the previous step; None or zeros for the first step.
            unet_inputs: Further arguments of `UNet2DConditionModel.forward`.

        Returns:
            The output of the UNet, [B, C', Hl, Wl], and the new states `sws_state_text`, [1, n, n], and, if
            calls are counted, `calls`, [1], modulo 64; in float32 (in float64 for a float64 UNet).

        Raises:
            ExportError: The state has another name or shape.
        """
        dtype = torch.promote_types(sample.dtype, torch.float32)
        tokens = encoder_hidden_states.shape[1]
        state = self._checked(state, tokens)
        run = _Run(
            transport=state[COMFYUI_NODE_STATE][0].to(dtype),
            calls=state[CALLS_STATE].to(dtype) if CALLS_STATE in state else None,
            sigma=sigma.to(dtype),
            intensity=intensity[:1].to(dtype),
            parameters=self._parameters,
        )
        self.records = run.records
        self.schedule = run.schedule(after=1)
        with installed(self._unet, {path: _SiteProcessor(path, run) for path in self.sites}):
            (out,) = self._unet(sample, timestep, encoder_hidden_states, return_dict=False, **unet_inputs)
        calls = {} if run.calls is None else {CALLS_STATE: run.calls.remainder(CALL_CYCLE)}
        return out, {COMFYUI_NODE_STATE: run.transport[None], **calls}

    def _checked(self, state: dict[str, Tensor] | None, tokens: int) -> dict[str, Tensor]:
        """The state of the step before; zeros for the first step."""
        shapes = {COMFYUI_NODE_STATE: (1, tokens, tokens), CALLS_STATE: (1,)}
        if state is None:
            return {name: torch.zeros(shapes[name]) for name in self._state_names}
        if state.keys() != self._state_names:
            expected = ", ".join(sorted(self._state_names))
            raise ExportError(f"state: expected {expected}, found {', '.join(state) or 'nothing'}")
        for name, found in state.items():
            if found.shape != shapes[name]:
                raise ExportError(
                    f"state {name}: expected shape {list(shapes[name])}, found {list(found.shape)}"
                )
        return state


@dataclasses.dataclass
class _Run:
    """One step. Each site reads `transport` and replaces it for the next site.

    `calls` is the number of calls so far, [1], or None if the schedule is that of `sigma`.
    """

    transport: Tensor
    calls: Tensor | None
    sigma: Tensor
    intensity: Tensor
    parameters: SwsParameters
    records: dict[str, SiteResult] = dataclasses.field(default_factory=dict)

    def schedule(self, after: int) -> ComfyUINodeSchedule:
        """The schedule after as many more calls."""
        if self.calls is None:
            return comfyui_node_schedule(self.sigma, self.parameters)
        return comfyui_node_call_schedule(self.calls + after, self.parameters)


@dataclasses.dataclass(frozen=True)
class _SiteProcessor:
    """diffusers' AttnProcessor2_0 on the patched inputs."""

    path: str
    run: _Run

    def __call__(
        self,
        attn: "Attention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of image tokens [B, T, C] to text tokens [B, n, X]; returns [B, T, C]."""
        if encoder_hidden_states is None or attention_mask is not None or attn.norm_cross:
            raise ExportError(
                f"{self.path}: the ComfyUI node supports cross-attention without a mask and norm_cross only"
            )
        run = self.run
        if run.calls is not None:
            run.calls = run.calls + 1
        now = run.schedule(after=0)
        found = comfyui_node_patch(
            hidden_states,
            encoder_hidden_states,
            encoder_hidden_states,
            run.transport,
            fresh_transport(encoder_hidden_states.shape[1], now.u, run.parameters),
            now,
            run.intensity,
            run.parameters,
        )
        run.transport = found.transport
        q, k, v = (
            projection(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projection, x in ((attn.to_q, found.q), (attn.to_k, found.k), (attn.to_v, found.v))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        scalars = {
            "alpha_k": found.alpha_k,
            "a_v": found.a_v,
            "amplitude": found.amplitude,
            "hu": found.uncertainty,
            "entropy_mean": found.entropy.mean(),
            "entropy_min": found.entropy.min(),
            "entropy_max": found.entropy.max(),
            "kl": found.kl,
        }
        batch = len(hidden_states)
        run.records[self.path] = SiteResult(
            out=out, **{name: value.expand(batch) for name, value in scalars.items()}
        )
        joined: Tensor = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return joined / float(attn.rescale_output_factor)

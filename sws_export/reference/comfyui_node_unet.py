"""The node on a live diffusers UNet, through attention processors, with its one state carried."""

import dataclasses
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graph_passes.parameters import SwsParameters
from sws_export.errors import ExportError
from sws_export.reference.attention import SiteResult
from sws_export.reference.comfyui_node_guard import ComfyUINodeSchedule, comfyui_node_schedule, node_patch
from sws_export.reference.comfyui_node_transport import fresh_transport
from sws_export.reference.unet import chosen_paths, installed

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

NODE_STATE = "sws_state_text"


def node_sites(unet: "UNet2DConditionModel") -> list[str]:
    """Paths of the cross-attention modules that the node patches, in the order of the UNet's modules."""
    from diffusers.models.attention_processor import Attention

    return [
        path
        for path, module in unet.named_modules()
        if isinstance(module, Attention) and path.endswith(".attn2") and module.is_cross_attention
    ]


class ComfyUINodeReferenceUNet:
    """A UNet whose cross-attention is patched as the node does it, one sampling step a call.

    The UNet itself is left as it was after each step.

    Attributes:
        sites: Paths of the attention modules that are patched.
        records: What each of them computed in the last step, by path, in the order of their execution.
            Scalars are those of the whole batch, the same for each sample.
        schedule: That of the last step.
    """

    sites: list[str]
    records: dict[str, SiteResult]
    schedule: ComfyUINodeSchedule

    def __init__(
        self,
        unet: "UNet2DConditionModel",
        parameters: SwsParameters,
        sites: Callable[[str], bool] | Collection[str] | None = None,
    ) -> None:
        """Choose the sites of a UNet.

        Args:
            unet: In any float dtype, in evaluation mode.
            parameters: The constants of the method; `schedule` and `scales` are of no meaning here.
            sites: Paths of attention modules, or a predicate of a path; None means all cross-attention.

        Raises:
            ExportError: A path is no cross-attention of the UNet, or no site is left.
        """
        self.sites = chosen_paths(node_sites(unet), sites, "cross-attention")
        self.records = {}
        self._unet = unet
        self._parameters = parameters

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
            sample: Latents, [B, C, Hl, Wl], the UNet's dtype.
            timestep: [B], as diffusers.
            encoder_hidden_states: [B, n, X], the UNet's dtype.
            sigma: Noise levels, [B]; that of the first sample counts for all.
            intensity: Strengths in [0, 1], [B]; likewise.
            state: As returned by the step before; None or zeros where there was none.
            unet_inputs: Further inputs of the UNet's `forward`, under diffusers' names.

        Returns:
            The UNet's output, [B, C', Hl, Wl], and the new state `sws_state_text`, [1, n, n], in float32, or
            float64 if the UNet is float64.

        Raises:
            ExportError: The state is another one, or has another shape.
        """
        dtype = torch.promote_types(sample.dtype, torch.float32)
        tokens = encoder_hidden_states.shape[1]
        self.schedule = now = comfyui_node_schedule(sigma.to(dtype), self._parameters)
        run = _Run(
            transport=_transport(state, tokens).to(dtype),
            fresh=fresh_transport(tokens, now.u, self._parameters),
            schedule=now,
            intensity=intensity[:1].to(dtype),
            parameters=self._parameters,
        )
        self.records = run.records
        with installed(self._unet, {path: _SiteProcessor(path, run) for path in self.sites}):
            (out,) = self._unet(sample, timestep, encoder_hidden_states, return_dict=False, **unet_inputs)
        return out, {NODE_STATE: run.transport[None]}


def _transport(state: dict[str, Tensor] | None, tokens: int) -> Tensor:
    if state is None:
        return torch.zeros(tokens, tokens)
    if state.keys() != {NODE_STATE}:
        raise ExportError(f"state: expected {NODE_STATE}, found {', '.join(state) or 'nothing'}")
    found = state[NODE_STATE]
    if found.shape != (1, tokens, tokens):
        raise ExportError(
            f"state {NODE_STATE}: expected shape {[1, tokens, tokens]}, found {list(found.shape)}"
        )
    return found[0]


@dataclasses.dataclass
class _Run:
    """One step on its way through the sites, which hand `transport` to each other."""

    transport: Tensor
    fresh: Tensor
    schedule: ComfyUINodeSchedule
    intensity: Tensor
    parameters: SwsParameters
    records: dict[str, SiteResult] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _SiteProcessor:
    """Does what diffusers' AttnProcessor2_0 does, on inputs that the node has changed."""

    path: str
    run: _Run

    def __call__(
        self,
        attn: "Attention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of tokens [B, T, C] to text [B, n, X], as [B, T, C]."""
        if encoder_hidden_states is None or attention_mask is not None or attn.norm_cross:
            raise ExportError(f"{self.path}: a site of the node takes a text, no mask and no further norm")
        run = self.run
        found = node_patch(
            hidden_states,
            encoder_hidden_states,
            encoder_hidden_states,
            run.transport,
            run.fresh,
            run.schedule,
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

"""Sigma-Weighted Shuffle on a live diffusers UNet, through attention processors, with its state carried."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graph_passes.grids import TEXT, Grid, in_order
from graph_passes.parameters import STATE_RADIUS, SwsParameters, diamond_offsets
from sws_export.errors import ExportError
from sws_export.reference.attention import SiteResult, attention_site
from sws_export.reference.noise_schedule import Schedule, schedule
from sws_export.reference.transport import band_from_dense, blended_transport, dense_from_band, momentum

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention


@dataclasses.dataclass(frozen=True)
class Site:
    """One attention module.

    Attributes:
        path: Its name in the UNet, as in "down_blocks.0.attentions.0.transformer_blocks.0.attn1".
        grid: The grid of its keys and values: of the image, or the text in cross-attention.
    """

    path: str
    grid: Grid

    @property
    def state_name(self) -> str:
        """The state that holds the transport of this site's grid."""
        return f"sws_state_{self.grid.name}"


def self_attention_sites(unet: "UNet2DConditionModel") -> list[Site]:
    """All self-attention modules in the blocks of a UNet, in the order of its modules."""
    return [site for site in attention_sites(unet) if site.grid != TEXT]


def attention_sites(unet: "UNet2DConditionModel") -> list[Site]:
    """Attention modules in the blocks of a UNet, to the image itself or to the text, in order.

    Those that add keys of their own to the text's, or normalise the text, are none.
    """
    from diffusers.models.attention_processor import Attention

    deepest = len(unet.config.block_out_channels) - 1
    sites = []
    for path, module in unet.named_modules():
        if isinstance(module, Attention) and module.added_kv_proj_dim is None and not module.norm_cross:
            # Blocks change the resolution after their attention.
            match path.split("."):
                case ["down_blocks", index, *_]:
                    level = int(index)
                case ["mid_block", *_]:
                    level = deepest
                case ["up_blocks", index, *_]:
                    level = deepest - int(index)
                case _:
                    continue
            sites.append(Site(path, TEXT if module.is_cross_attention else Grid(2**level)))
    return sites


def chosen_paths(
    known: Sequence[str], sites: Callable[[str], bool] | Collection[str] | None, kind: str
) -> list[str]:
    """Those of the paths `known` that are named by `sites`, or that it is true of; None means all.

    Raises:
        ExportError: A path is no `kind` of the UNet, or no site is left.
    """
    there_are = f"the UNet has {', '.join(known) or 'none'}"
    if sites is not None and not callable(sites):
        unknown = set(sites) - set(known)
        if unknown:
            raise ExportError(f"sites: no {kind} at {', '.join(sorted(unknown))}; {there_are}")
        sites = frozenset(sites).__contains__
    chosen = [path for path in known if sites is None or sites(path)]
    if not chosen:
        raise ExportError(f"sites: none chosen; {there_are}")
    return chosen


class ReferenceUNet:
    """A UNet whose attention is shuffled, one sampling step a call.

    The UNet itself is left as it was after each step.

    Attributes:
        sites: The attention modules that are shuffled.
        records: What each of them computed in the last step, by path.
        schedule: That of the last step.
    """

    sites: list[Site]
    records: dict[str, SiteResult]
    schedule: Schedule

    def __init__(
        self,
        unet: "UNet2DConditionModel",
        parameters: SwsParameters,
        sites: Callable[[str], bool] | Collection[str] | None = None,
    ) -> None:
        """Choose the sites of a UNet.

        Args:
            unet: In any float dtype, in evaluation mode.
            parameters: The constants of the method.
            sites: Paths of attention modules, or a predicate of a path; None means all self-attention.

        Raises:
            ExportError: A path is no attention of the UNet, or no site is left.
        """
        known = self_attention_sites(unet) if sites is None else attention_sites(unet)
        chosen = frozenset(chosen_paths([site.path for site in known], sites, "attention"))
        self.sites = [site for site in known if site.path in chosen]
        self.records = {}
        self._unet = unet
        self._parameters = parameters

    def state_shapes(
        self, batch: int, height: int, width: int, tokens: int
    ) -> dict[str, tuple[int, int, int, int]]:
        """Shape of each state for `batch` latents of `height` x `width` and `tokens` tokens of text.

        [B, 145, ceil(H/d), ceil(W/d)] for a grid of the image, [B, 145, 1, tokens] for the text.
        """
        entries = len(diamond_offsets(STATE_RADIUS))
        return {
            f"sws_state_{grid.name}": (batch, entries, 1, tokens)
            if grid.factor is None
            else (batch, entries, -(-height // grid.factor), -(-width // grid.factor))
            for grid in in_order(site.grid for site in self.sites)
        }

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
            encoder_hidden_states: [B, L, X], the UNet's dtype.
            sigma: Noise levels, [B].
            intensity: Strengths in [0, 1], [B].
            state: As returned by the step before; None or zeros where there was none. That of the text
                must be zeros where the number of tokens is another.
            unet_inputs: Further inputs of the UNet's `forward`, under diffusers' names.

        Returns:
            The UNet's output, [B, C', Hl, Wl], and the new state, [B, 145, H, W] for each grid, in float32,
            or float64 if the UNet is float64.

        Raises:
            ExportError: The state does not fit the sites and the latents.
        """
        dtype = torch.promote_types(sample.dtype, torch.float32)
        intensity = intensity.to(dtype)
        self.schedule = now = schedule(sigma.to(dtype), intensity, self._parameters)
        tokens = encoder_hidden_states.shape[1]
        shapes = self.state_shapes(len(sample), sample.shape[2], sample.shape[3], tokens)
        _check_state(state, shapes)

        transports, new_state = {}, {}
        for name, shape in shapes.items():
            band = sample.new_zeros(shape, dtype=dtype) if state is None else state[name].to(dtype)
            fresh = blended_transport(now.u, *shape[-2:], self._parameters)
            transports[name] = momentum(dense_from_band(band), fresh, self._parameters)
            new_state[name] = band_from_dense(transports[name], *shape[-2:])

        self.records = {}
        processors = {
            site.path: _SiteProcessor(
                site, transports[site.state_name], now, intensity, self._parameters, self.records
            )
            for site in self.sites
        }
        with installed(self._unet, processors):
            (out,) = self._unet(sample, timestep, encoder_hidden_states, return_dict=False, **unet_inputs)
        return out, new_state


def _check_state(state: dict[str, Tensor] | None, shapes: dict[str, tuple[int, int, int, int]]) -> None:
    if state is None:
        return
    if state.keys() != shapes.keys():
        raise ExportError(f"state: expected {', '.join(shapes)}, found {', '.join(state) or 'nothing'}")
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise ExportError(f"state {name}: expected shape {list(shape)}, found {list(state[name].shape)}")


@contextlib.contextmanager
def installed(unet: "UNet2DConditionModel", processors: Mapping[str, Any]) -> Iterator[None]:
    """The UNet with other processors at some of its attention modules, for a while."""
    modules = {path: unet.get_submodule(path) for path in processors}
    originals = {path: module.processor for path, module in modules.items()}
    try:
        for path, module in modules.items():
            module.set_processor(processors[path])
        yield
    finally:
        for path, module in modules.items():
            module.set_processor(originals[path])


@dataclasses.dataclass(frozen=True)
class _SiteProcessor:
    """Does what diffusers' AttnProcessor2_0 does, but for the attention itself."""

    site: Site
    transport: Tensor
    schedule: Schedule
    intensity: Tensor
    parameters: SwsParameters
    records: dict[str, SiteResult]

    def __call__(
        self,
        attn: "Attention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attention of tokens [B, T, C] or pixels [B, C, H, W], in the same layout.

        To themselves, or to the text [B, tokens, X].
        """
        self._check(encoder_hidden_states, attention_mask)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if residual.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        )
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        result = attention_site(q, k, v, self.transport, self.schedule, self.intensity, self.parameters)
        self.records[self.site.path] = result

        out: Tensor = attn.to_out[0](result.out.transpose(1, 2).flatten(2))
        out = attn.to_out[1](out)
        if residual.ndim == 4:
            out = out.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            out = out + residual
        return out / float(attn.rescale_output_factor)

    def _check(self, encoder_hidden_states: Tensor | None, attention_mask: Tensor | None) -> None:
        if attention_mask is not None:
            raise ExportError(f"{self.site.path}: a shuffled site takes no attention mask")
        if (encoder_hidden_states is not None) != (self.site.grid == TEXT):
            kind = "needs the text" if self.site.grid == TEXT else "is self-attention and takes no text"
            raise ExportError(f"{self.site.path}: this site {kind}")

"""A diffusers UNet with Sigma-Weighted Shuffle, through attention processors."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graph_passes.grids import TEXT, Grid, sorted_grids
from graph_passes.parameters import STATE_RADIUS, SwsParameters, diamond_offsets
from sws_export.errors import ExportError
from sws_export.reference.attention import SiteResult, attention_site
from sws_export.reference.noise_schedule import Schedule, schedule
from sws_export.reference.transport import band_from_dense, blended_transport, dense_from_band, momentum

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention


@dataclasses.dataclass(frozen=True)
class ReferenceSite:
    """One attention module.

    Attributes:
        path: Module path in the UNet, such as "down_blocks.0.attentions.0.transformer_blocks.0.attn1".
        grid: Grid of the keys and values: an image grid, or the text for cross-attention.
        factor: Downsampling of the grid of the queries.
    """

    path: str
    grid: Grid
    factor: int

    @property
    def state_name(self) -> str:
        """Name of the state with the transport of the grid."""
        return f"sws_state_{self.grid.name}"


def self_attention_sites(unet: "UNet2DConditionModel") -> list[ReferenceSite]:
    """All self-attention modules in the blocks of a UNet, in module order."""
    return [site for site in attention_sites(unet) if site.grid != TEXT]


def attention_sites(unet: "UNet2DConditionModel") -> list[ReferenceSite]:
    """All self-attention and cross-attention modules in the blocks of a UNet, in module order.

    Modules with additional key projections (`added_kv_proj_dim`) or `norm_cross` are not included.
    """
    from diffusers.models.attention_processor import Attention

    deepest = len(unet.config.block_out_channels) - 1
    sites = []
    for path, module in unet.named_modules():
        if isinstance(module, Attention) and module.added_kv_proj_dim is None and not module.norm_cross:
            # A block changes the resolution after its attention modules.
            match path.split("."):
                case ["down_blocks", index, *_]:
                    level = int(index)
                case ["mid_block", *_]:
                    level = deepest
                case ["up_blocks", index, *_]:
                    level = deepest - int(index)
                case _:
                    continue
            factor = 2**level
            sites.append(ReferenceSite(path, TEXT if module.is_cross_attention else Grid(factor), factor))
    return sites


def chosen_paths(
    known: Sequence[str], sites: Callable[[str], bool] | Collection[str] | None, kind: str
) -> list[str]:
    """Select paths.

    Args:
        known: All paths of the kind.
        sites: Paths to select, or a predicate of a path; None selects all.
        kind: Kind of the modules, for messages.

    Raises:
        ExportError: A path is not in `known`, or no path is selected.
    """
    available = f"the UNet has {', '.join(known) or 'none'}"
    if sites is not None and not callable(sites):
        unknown = set(sites) - set(known)
        if unknown:
            raise ExportError(f"sites: no {kind} at {', '.join(sorted(unknown))}; {available}")
        sites = frozenset(sites).__contains__
    chosen = [path for path in known if sites is None or sites(path)]
    if not chosen:
        raise ExportError(f"sites: none selected; {available}")
    return chosen


class ReferenceUNet:
    """A UNet with SWS; one sampling step for each call.

    The attention processors of the UNet are restored after each step.

    Attributes:
        sites: The attention modules with SWS.
        records: Results of the sites in the last step, by path.
        schedule: Schedule of the last step.
    """

    sites: list[ReferenceSite]
    records: dict[str, SiteResult]
    schedule: Schedule

    def __init__(
        self,
        unet: "UNet2DConditionModel",
        parameters: SwsParameters,
        sites: Callable[[str], bool] | Collection[str] | None = None,
        kl_strides: tuple[int, int] = (1, 1),
    ) -> None:
        """Choose the sites of a UNet.

        Args:
            unet: The UNet in evaluation mode, in any float dtype.
            parameters: Parameters of the method.
            sites: Paths of attention modules, or a predicate of a path; None selects all self-attention.
            kl_strides: Strides (rows, columns) of the grid whose query rows the KL divergence is the mean of.

        Raises:
            ExportError: A path is not an attention module of the UNet, or no site is selected.
        """
        known = self_attention_sites(unet) if sites is None else attention_sites(unet)
        chosen = frozenset(chosen_paths([site.path for site in known], sites, "attention"))
        self.sites = [site for site in known if site.path in chosen]
        self.records = {}
        self._unet = unet
        self._parameters = parameters
        self._kl_strides = kl_strides

    def state_shapes(
        self, batch: int, height: int, width: int, tokens: int
    ) -> dict[str, tuple[int, int, int, int]]:
        """Shape of each state for `batch` latents of `height` x `width` and `tokens` text tokens.

        [B, 145, ceil(H/d), ceil(W/d)] for an image grid with factor d, [B, 145, 1, tokens] for the text.
        """
        entries = len(diamond_offsets(STATE_RADIUS))
        return {
            f"sws_state_{grid.name}": (batch, entries, 1, tokens)
            if grid.factor is None
            else (batch, entries, -(-height // grid.factor), -(-width // grid.factor))
            for grid in sorted_grids(site.grid for site in self.sites)
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
            sample: Latents, [B, C, Hl, Wl], in the dtype of the UNet.
            timestep: Timesteps, [B].
            encoder_hidden_states: Text embeddings, [B, L, X], in the dtype of the UNet.
            sigma: Noise levels, [B].
            intensity: Strengths in [0, 1], [B].
            state: State returned by the previous step; None or zeros for the first step. The state of the
                text must be zeros if the number of tokens changes.
            unet_inputs: Further arguments of `UNet2DConditionModel.forward`.

        Returns:
            The output of the UNet, [B, C', Hl, Wl], and the new state, [B, 145, H, W] for each grid, in
            float32 (in float64 for a float64 UNet).

        Raises:
            ExportError: The names or shapes of the state do not match the sites and the latents.
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
                site,
                transports[site.state_name],
                now,
                intensity,
                self._parameters,
                self.records,
                lattice(sample.shape[2:], site.factor, self._kl_strides),
            )
            for site in self.sites
        }
        with installed(self._unet, processors):
            (out,) = self._unet(sample, timestep, encoder_hidden_states, return_dict=False, **unet_inputs)
        return out, new_state


def lattice(size: Sequence[int], factor: int, strides: tuple[int, int]) -> Tensor | None:
    """Indices of the query rows of a lattice on the grid of a site; None for all of them.

    The lattice starts at the second row and column of the grid, where there are so many.

    Args:
        size: Height and width of the latent.
        factor: Downsampling of the grid.
        strides: Of rows and columns.
    """
    if strides == (1, 1):
        return None
    sides = [-(-side // factor) for side in size]
    rows, columns = (
        torch.arange(min(1, stride - 1, side - 1), side, stride)
        for stride, side in zip(strides, sides, strict=True)
    )
    return (rows[:, None] * sides[1] + columns).flatten()


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
    """Replace the processors of some attention modules inside the `with` block."""
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
    """diffusers' AttnProcessor2_0 with SWS in place of the plain attention."""

    site: ReferenceSite
    transport: Tensor
    schedule: Schedule
    intensity: Tensor
    parameters: SwsParameters
    records: dict[str, SiteResult]
    kl_rows: Tensor | None

    def __call__(
        self,
        attn: "Attention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attention of tokens [B, T, C] or pixels [B, C, H, W]; returned in the same layout.

        The keys are the hidden states themselves or text embeddings [B, tokens, X].
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
        result = attention_site(
            q, k, v, self.transport, self.schedule, self.intensity, self.parameters, self.kl_rows
        )
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
            raise ExportError(f"{self.site.path}: attention masks are not supported at a site with SWS")
        if (encoder_hidden_states is not None) != (self.site.grid == TEXT):
            found = (
                "needs encoder_hidden_states" if self.site.grid == TEXT else "takes no encoder_hidden_states"
            )
            kind = "cross-attention" if self.site.grid == TEXT else "self-attention"
            raise ExportError(f"{self.site.path}: {kind} {found}")

"""An exported UNet in the place of the `diffusion_model` of a ComfyUI model.

Nothing of ComfyUI is imported here: the node in integrations/comfyui/ does that.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch

from sws_export.runtime.errors import StepError
from sws_export.runtime.session import RECOMMENDED_INTENSITY, Session, Stream
from sws_export.tensors import PRECISIONS

_POOLED = 1280
_EMBEDDING = 256
_LARGEST_SIZE = 8192
_RESOLUTION = 0.5


class SwsDiffusionModel:
    """Called as ComfyUI's `BaseModel.apply_model` calls its `diffusion_model`.

    The noise level is the one that the sampler passes in `transformer_options["sigmas"]`. ComfyUI may run the
    conditions of one step together or one after the other, so each combination has a stream of its own; all
    begin anew with a new list of `sample_sigmas`, which every sampling run makes. Of an artefact whose state
    lasts (`--preset node`) there is one stream, which goes on from run to run, as the published node does.

    Attributes:
        intensity: Strength of SWS in [0, 1].
        dtype: Precision that ComfyUI shall give its tensors.
        session: What runs the UNet.
    """

    def __init__(self, session: Session, intensity: float = RECOMMENDED_INTENSITY) -> None:
        self.intensity = intensity
        self.dtype: torch.dtype = getattr(torch, PRECISIONS[session.contract.manifest["precision"]].dtype)
        self.session = session
        self._names = [spec.name for spec in session.contract.inputs]
        self._streams: dict[tuple[Any, ...], Stream] = {}
        self._run: Any = None
        self._last = float("inf")

    @classmethod
    def load(cls, path: Path | str, intensity: float = RECOMMENDED_INTENSITY) -> Self:
        """Load what `sws-export` wrote; errors are those of `Session.load`."""
        return cls(Session.load(path), intensity)

    def __call__(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        control: object = None,
        transformer_options: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """One prediction.

        Args:
            x: Latent, scaled for the model, [B, C, H, W]; conditions one after the other along B.
            timesteps: [B].
            context: Text embeddings, [B, L, X].
            y: SDXL's pooled text and embedded sizes, [B, 1280 + 256 N].
            control: ControlNet's residuals, which the graph does not take.
            transformer_options: `sigmas` [b], with B a multiple of b; `sample_sigmas`, `uuids` and
                `cond_or_uncond` where ComfyUI gives them.
            others: Further conditions of the model; the graph takes none.

        Raises:
            StepError: ControlNet or another input that the graph does not have, or a shape it does not take.
        """
        if control is not None:
            raise StepError(
                "ControlNet is not in the exported graph; remove it from the workflow, or use the torch model"
            )
        options = transformer_options or {}
        if "sigmas" not in options:
            raise StepError("transformer_options has no sigmas; this version of ComfyUI is too old")
        sigmas = options["sigmas"].float()
        conditions = split_adm(y) if y is not None and "text_embeds" in self._names else {}
        self._follow(options.get("sample_sigmas"), float(sigmas.max()))
        prediction = self._stream(options).step(
            x,
            timesteps,
            context,
            sigma=sigmas.repeat(len(x) // len(sigmas)),
            intensity=self.intensity,
            **conditions,
            **others,
        )
        return torch.as_tensor(prediction)

    def to(self, *arguments: Any, **named: Any) -> Self:  # noqa: ARG002  (torch's signature)
        """Stay where it is: the session has its own device."""
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        """No weights that ComfyUI could move or patch."""
        return {}

    def load_state_dict(self, *arguments: Any, **named: Any) -> tuple[list[str], list[str]]:  # noqa: ARG002
        """Take no weights."""
        return [], []

    def _follow(self, run: Any, sigma: float) -> None:
        """Drop all streams where a new sampling run begins."""
        # Samplers that add noise on their way go up by themselves: a sign only where no list tells.
        begins = run is not self._run if run is not None else sigma > self._last
        if begins and self.session.contract.resets_per_image:
            self._streams.clear()
        # Holding the list keeps its identity from being used again.
        self._run, self._last = run, sigma

    def _stream(self, options: Mapping[str, Any]) -> Stream:
        key: tuple[Any, ...] = ()
        if self.session.contract.resets_per_image:
            key = (*options.get("uuids", ()), *options.get("cond_or_uncond", ()))
        if key not in self._streams:
            self._streams[key] = self.session.stream()
        return self._streams[key]


def split_adm(y: torch.Tensor) -> dict[str, torch.Tensor]:
    """SDXL's `text_embeds` and `time_ids` out of the one vector that ComfyUI makes of them.

    ComfyUI has turned each size n into cos and sin of n · 10000^(−i/128), i = 0…127. The size is found as the
    half-integer whose embedding points the same way, which float16 leaves unmistakable.

    Args:
        y: [B, 1280 + 256 N], any float dtype.

    Returns:
        `text_embeds` [B, 1280] in the dtype of `y`, and `time_ids` [B, N], float32.

    Raises:
        StepError: The width is not that.
    """
    count, rest = divmod(y.shape[1] - _POOLED, _EMBEDDING)
    if rest or count < 1:
        raise StepError(f"y: expected [B, {_POOLED} + {_EMBEDDING} N], found {list(y.shape)}")
    embedded = y[:, _POOLED:].reshape(-1, _EMBEDDING).float().cpu()
    nearest = (embedded @ _size_embeddings().T).argmax(dim=1)
    time_ids = (nearest * _RESOLUTION).reshape(len(y), count)
    return {"text_embeds": y[:, :_POOLED], "time_ids": time_ids}


@functools.cache
def _size_embeddings() -> torch.Tensor:
    """Embedding of 0, 0.5, 1 … 8192, each of the same length, [16385, 256]."""
    return embed_sizes(torch.arange(0, _LARGEST_SIZE + _RESOLUTION, _RESOLUTION))


def embed_sizes(sizes: torch.Tensor) -> torch.Tensor:
    """The embedding of latent-diffusion's `timestep_embedding` for numbers [N], as [N, 256] float32."""
    half = _EMBEDDING // 2
    rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = sizes.double()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def family_of(session: Session) -> str:
    """Which of ComfyUI's models the artefact's UNet is, from its inputs: sd15, sd20, sdxl or sdxl_refiner.

    Raises:
        StepError: The text embeddings have a width of no Stable Diffusion.
    """
    shapes = {spec.name: spec.shape for spec in session.contract.inputs}
    if "time_ids" in shapes:
        return "sdxl_refiner" if shapes["time_ids"][1] == 5 else "sdxl"
    width = shapes["encoder_hidden_states"][2]
    known = {768: "sd15", 1024: "sd20"}
    if width not in known:
        raise StepError(
            f"{session.contract.path.name}: text embeddings of width {width} are of no model that the node "
            "knows; known are 768 (SD 1), 1024 (SD 2) and SDXL"
        )
    return known[int(width)]

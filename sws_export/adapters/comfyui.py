"""An exported UNet as the `diffusion_model` of a ComfyUI model.

Neither ComfyUI nor torch is imported with this module: the node in integrations/comfyui/ imports ComfyUI.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from sws_export.errors import StepError
from sws_export.runtime.inputs import to_numpy
from sws_export.runtime.session import RECOMMENDED_INTENSITY, Session, Stream
from sws_export.tensors import PRECISIONS

if TYPE_CHECKING:
    import torch

_POOLED = 1280
_EMBEDDING = 256
_LARGEST_SIZE = 8192
_RESOLUTION = 0.5


class SwsDiffusionModel:
    """Called the way ComfyUI's `BaseModel.apply_model` calls its `diffusion_model`.

    The noise level is the one that the sampler passes in `transformer_options["sigmas"]`. ComfyUI may run the
    conditions of one step together or one after the other, so each combination has its own stream. All
    streams are dropped when `sample_sigmas` is a new list, which every sampling run creates. If the state is
    persistent (`--preset comfyui-node`), one stream continues from run to run, as in the published node.

    Attributes:
        intensity: Strength of SWS in [0, 1].
        session: Runs the UNet.
    """

    def __init__(self, session: Session, intensity: float = RECOMMENDED_INTENSITY) -> None:
        self.intensity = intensity
        self.session = session
        self._names = [spec.name for spec in session.contract.inputs]
        self._streams: dict[tuple[Any, ...], Stream] = {}
        self._run: Any = None
        self._last_sigma = float("inf")

    @classmethod
    def load(cls, path: Path | str, intensity: float = RECOMMENDED_INTENSITY, **session_options: Any) -> Self:
        """Load an artefact; options and errors as in `Session.load`."""
        return cls(Session.load(path, **session_options), intensity)

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype in which ComfyUI passes its tensors: the precision of the UNet."""
        import torch

        dtype: torch.dtype = getattr(torch, PRECISIONS[self.session.contract.manifest["precision"]].dtype)
        return dtype

    def __call__(
        self,
        x: "torch.Tensor",
        timesteps: "torch.Tensor",
        context: "torch.Tensor | None" = None,
        y: "torch.Tensor | None" = None,
        control: object = None,
        transformer_options: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> "torch.Tensor":
        """Predict once.

        Args:
            x: Latent, scaled for the model, [B, C, H, W]; conditions one after the other along B.
            timesteps: [B].
            context: Text embeddings, [B, L, X].
            y: SDXL's pooled text and embedded sizes, [B, 1280 + 256 N].
            control: ControlNet residuals; must be None.
            transformer_options: `sigmas` [b], with B a multiple of b; optionally `sample_sigmas`, `uuids` and
                `cond_or_uncond`.
            others: Further conditions of the model; must be None.

        Raises:
            StepError: ControlNet or another input that the graph does not have, or a wrong shape.
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
        self._drop_streams_of_other_runs(options.get("sample_sigmas"), float(sigmas.max()))
        prediction: torch.Tensor = self._stream(options).step(
            x,
            timesteps,
            context,
            sigma=sigmas.repeat(len(x) // len(sigmas)),
            intensity=self.intensity,
            **conditions,
            **others,
        )
        return prediction

    def to(self, *arguments: Any, **named: Any) -> Self:  # noqa: ARG002  (torch's signature)
        """Do nothing: the session has its own device."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Nothing: there are no weights that ComfyUI could move or patch."""
        return {}

    def load_state_dict(self, *arguments: Any, **named: Any) -> tuple[list[str], list[str]]:  # noqa: ARG002
        """Do nothing; no keys are missing or unexpected."""
        return [], []

    def _drop_streams_of_other_runs(self, run: Any, sigma: float) -> None:
        # Without a list of sigmas, a rising noise level is the only sign of a new run. With one it is not a
        # sign: ancestral samplers add noise between steps.
        is_new = run is not self._run if run is not None else sigma > self._last_sigma
        if is_new and self.session.contract.resets_per_image:
            self._streams.clear()
        # Keep a reference to the list, so that its identity is not reused.
        self._run, self._last_sigma = run, sigma

    def _stream(self, options: Mapping[str, Any]) -> Stream:
        key: tuple[Any, ...] = ()
        if self.session.contract.resets_per_image:
            key = (*options.get("uuids", ()), *options.get("cond_or_uncond", ()))
        if key not in self._streams:
            self._streams[key] = self.session.stream()
        return self._streams[key]


def split_adm(y: "torch.Tensor") -> dict[str, Any]:
    """Recover SDXL's `text_embeds` and `time_ids` from the vector that ComfyUI builds from them.

    ComfyUI embeds each size n as cos and sin of n · 10000^(−i/128), i = 0…127. The size is recovered as the
    multiple of 0.5 with the most similar embedding, which is unambiguous in float16 too.

    Args:
        y: [B, 1280 + 256 N], any float dtype.

    Returns:
        `text_embeds` [B, 1280], a part of `y`, and `time_ids` [B, N], a float32 array.

    Raises:
        StepError: The width is not 1280 + 256 N.
    """
    count, rest = divmod(y.shape[1] - _POOLED, _EMBEDDING)
    if rest or count < 1:
        raise StepError(f"y: expected [B, {_POOLED} + {_EMBEDDING} N], found {list(y.shape)}")
    embedded = to_numpy(y[:, _POOLED:]).reshape(-1, _EMBEDDING).astype(np.float32)
    nearest = (embedded @ _size_embeddings().T).argmax(axis=1)
    time_ids = (nearest * np.float32(_RESOLUTION)).reshape(len(y), count)
    return {"text_embeds": y[:, :_POOLED], "time_ids": time_ids}


@functools.cache
def _size_embeddings() -> npt.NDArray[np.float32]:
    """Embedding of 0, 0.5, 1 … 8192, all of the same length, [16385, 256]."""
    return embed_sizes(np.arange(0, _LARGEST_SIZE + _RESOLUTION, _RESOLUTION))


def embed_sizes(sizes: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The embedding of latent-diffusion's `timestep_embedding` of numbers [N], as [N, 256]."""
    half = _EMBEDDING // 2
    rates = 10000.0 ** (-np.arange(half) / half)
    angles = np.asarray(sizes, np.float64)[:, None] * rates
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def family_of(session: Session) -> str:
    """Which of ComfyUI's models the UNet belongs to, from its inputs: sd15, sd20, sdxl or sdxl_refiner.

    Raises:
        StepError: The width of the text embeddings is not that of a Stable Diffusion model.
    """
    shapes = {spec.name: spec.shape for spec in session.contract.inputs}
    if "time_ids" in shapes:
        return "sdxl_refiner" if shapes["time_ids"][1] == 5 else "sdxl"
    width = shapes["encoder_hidden_states"][2]
    known = {768: "sd15", 1024: "sd20"}
    if width not in known:
        raise StepError(
            f"{session.contract.path.name}: the node supports text embeddings of width 768 (SD 1), 1024 "
            f"(SD 2) and SDXL, found width {width}"
        )
    return known[int(width)]

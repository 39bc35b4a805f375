"""An exported UNet as the `diffusion_model` of a ComfyUI model."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sws_export.adapters.comfyui.conditions import ConditionStates, Row
from sws_export.adapters.comfyui.engine import Engine
from sws_export.adapters.comfyui.inputs import control_residuals, ignored_patches, split_adm
from sws_export.adapters.comfyui.sizes import batch_calls, needed_sides, rows_of
from sws_export.errors import StepError
from sws_export.runtime.inputs import convert_like, to_numpy
from sws_export.runtime.padding import pad_inputs
from sws_export.runtime.pixels import with_pixels
from sws_export.runtime.session import RECOMMENDED_INTENSITY, Stream
from sws_export.tensors import PRECISIONS

if TYPE_CHECKING:
    import torch

INTENSITY_OPTION = "sws_intensity"
"""Entry of `transformer_options` with the intensity; `RECOMMENDED_INTENSITY` without it."""

_LOG = logging.getLogger(__name__)


class SwsDiffusionModel:
    """Called the way ComfyUI's `BaseModel.apply_model` calls its `diffusion_model`.

    The noise level is the one that the sampler passes in `transformer_options["sigmas"]`. ComfyUI may run the
    conditions of one step together or one after the other, so each condition has its own state. `start_run`
    and `end_run` clear all states. If the state is persistent (`--preset comfyui-node`), one stream continues
    from run to run, as in the published node.

    Attributes:
        engine: The artefact.
        states: Those of the conditions of the run.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.states = ConditionStates()
        self._names = [spec.name for spec in engine.contract.inputs]
        self._persistent: Stream | None = None
        self._kept: dict[str, Any] = {}
        self._warned: set[str] = set()

    @classmethod
    def load(cls, path: Path | str, **session_options: Any) -> Self:
        """Open an artefact; options and errors as in `Engine.open`."""
        return cls(Engine.open(path, **session_options))

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype in which ComfyUI passes its tensors: the precision of the UNet."""
        import torch

        dtype: torch.dtype = getattr(torch, PRECISIONS[self.engine.contract.manifest["precision"]].dtype)
        return dtype

    def start_run(self) -> None:
        """Start a sampling run: the state of every condition is zero. A persistent state continues."""
        self.states.clear()

    def end_run(self) -> None:
        """Release what only the run needs."""
        self.states.clear()

    def unload(self) -> None:
        """Release the device memory; a persistent state is kept in host memory. The next call loads again."""
        self.states.clear()
        if self._persistent is not None:
            self._kept, self._persistent = self._persistent.state(), None
        self.engine.unload()

    def warn_once(self, what: str, consequence: str) -> None:
        """Log a warning, unless one about `what` was logged."""
        if what not in self._warned:
            self._warned.add(what)
            _LOG.warning("%s: %s: %s", self.engine.contract.path.name, what, consequence)

    def __call__(
        self,
        x: "torch.Tensor",
        timesteps: "torch.Tensor",
        context: "torch.Tensor | None" = None,
        y: "torch.Tensor | None" = None,
        control: Mapping[str, Any] | None = None,
        transformer_options: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> "torch.Tensor":
        """Predict once.

        Args:
            x: Latent, scaled for the model, [B, C, H, W]; conditions one after the other along B.
            timesteps: [B].
            context: Text embeddings, [B, L, X].
            y: SDXL's pooled text and embedded sizes, [B, 1280 + 256 N]; given to the graph under this name if
                it was made from ComfyUI's own ONNX export, otherwise as `text_embeds` and `time_ids`.
            control: ControlNet residuals, for a graph exported with `--controlnet`.
            transformer_options: `sigmas` [b], with B a multiple of b; optionally `uuids`, `cond_or_uncond`
                and `sws_intensity`.
            others: Further conditions of the model; must be None.

        Returns:
            The prediction, with the device and dtype of `x`.

        Raises:
            StepError: A residual or another input that the graph does not have, or a wrong shape or size.
        """
        options = transformer_options or {}
        if "sigmas" not in options:
            raise StepError("transformer_options has no sigmas; this version of ComfyUI is too old")
        for name in ignored_patches(options):
            self.warn_once(
                name, "an engine cannot apply it, and it has no effect; use the torch model for it"
            )
        sigmas = options["sigmas"].float()
        height, width = x.shape[2:]
        inputs = {
            "sample": x,
            "timestep": timesteps,
            "encoder_hidden_states": context,
            "sigma": sigmas.repeat(len(x) // len(sigmas)),
            **self._added_conditions(y),
            **control_residuals(control, self._names, self.engine.contract.path.name),
            **others,
        }
        inputs = self._padded(inputs, height, width)
        prediction = self._run(inputs, rows_of_call(options, len(x)), options)
        cropped: torch.Tensor = convert_like(prediction[:, :, :height, :width], x)
        return cropped

    def _added_conditions(self, y: "torch.Tensor | None") -> dict[str, Any]:
        if y is None:
            return {}
        return {"y": y} if "y" in self._names else split_adm(y) if "text_embeds" in self._names else {}

    def _padded(self, inputs: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        """The inputs of a latent of a size that the artefact takes, with one warning about each size."""
        contract = self.engine.contract
        sides = needed_sides(contract, height, width)
        if sides == (height, width):
            return inputs
        found, needed = (
            " x ".join(with_pixels(contract, side) for side in both) for both in ((height, width), sides)
        )
        self.warn_once(f"a latent of {found}", f"padded to {needed} and cropped, which changes its border")
        return pad_inputs(contract, inputs, sides)

    def _run(self, inputs: Mapping[str, Any], rows: list[Row], options: Mapping[str, Any]) -> Any:
        """The prediction of the whole batch, in as many calls as the artefact needs; see `Stream.step`."""
        intensity = options.get(INTENSITY_OPTION, RECOMMENDED_INTENSITY)
        if not self.engine.contract.resets_per_image:
            # All samples share the state, so that the batch cannot be split.
            return to_numpy(self._persistent_stream().step(**inputs, intensity=intensity))
        session = self.engine.session()
        height, width = inputs["sample"].shape[2:]
        predictions, start = [], 0
        for count, size in batch_calls(self.engine.contract, len(rows), height, width):
            stop = start + count
            part = {name: rows_of(value, start, stop, len(rows), size) for name, value in inputs.items()}
            # Padding has rows, and states, of its own.
            padding = [("padding", *rows[start], index) for index in range(size - count)]
            stream = self.states.stream(session, [*rows[start:stop], *padding])
            predictions.append(to_numpy(stream.step(**part, intensity=intensity))[:count])
            start = stop
        return predictions[0] if len(predictions) == 1 else np.concatenate(predictions)

    def _persistent_stream(self) -> Stream:
        if self._persistent is None:
            self._persistent = self.engine.session().stream()
            if self._kept:
                self._persistent.restore(self._kept)
        return self._persistent

    def to(self, *arguments: Any, **named: Any) -> Self:  # noqa: ARG002  (torch's signature)
        """Do nothing: the session has its own device."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Nothing: there are no weights that ComfyUI could move or patch."""
        return {}

    def load_state_dict(self, *arguments: Any, **named: Any) -> tuple[list[str], list[str]]:  # noqa: ARG002
        """Do nothing; no keys are missing or unexpected."""
        return [], []


def rows_of_call(options: Mapping[str, Any], batch: int) -> list[Row]:
    """One row for each sample: its condition, and its index in the condition."""
    chunks = len(options.get("cond_or_uncond") or ()) or 1
    kinds = list(options.get("cond_or_uncond") or [None])
    uuids = list(options.get("uuids") or [None] * chunks)
    return [
        (uuid, kind, index)
        for uuid, kind in zip(uuids, kinds, strict=True)
        for index in range(batch // chunks)
    ]

"""An exported UNet as the UNet of a diffusers pipeline."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from sws_export.errors import EngineError, OptionError, StepError
from sws_export.extras import missing_extras_as_errors
from sws_export.manifest import SourceEntry
from sws_export.noise_levels import edm_noise_levels, noise_levels
from sws_export.runtime.inputs import to_numpy
from sws_export.runtime.session import RECOMMENDED_INTENSITY, Session
from sws_export.tensors import DOWN_RESIDUAL, MID_RESIDUAL, PRECISIONS

with missing_extras_as_errors():
    import torch
    from diffusers.configuration_utils import FrozenDict
    from diffusers.models.embeddings import ImageProjection
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    from sws_export.adapters.fit_pipeline import EDM_TYPES, fit_pipeline, missing_settings
    from sws_export.checkpoint.ip_adapter import image_inputs, ip_adapters

INTENSITY_ARGUMENT = "intensity"

_NOT_IN_THE_GRAPH = {
    "attention_mask": "",
    "encoder_attention_mask": "",
    "down_intrablock_additional_residuals": " (T2I-Adapter)",
}


class SWSUNet:
    """Replaces `pipe.unet` of the Stable Diffusion pipelines of diffusers.

        unet = SWSUNet.load("unet.onnx").attach(pipe)
        pipe(prompt, cross_attention_kwargs={"intensity": 0.7})

    The noise level comes from the pipeline's scheduler, or for an EDM model from the timestep. The state is
    reset for every trajectory: when the scheduler gets new timesteps, when the noise level rises, and when
    the batch or size changes. A persistent state (`--preset comfyui-node`) is reset by `reset` only.

    `eval`, `to`, `requires_grad_`, `train` and `num_parameters` are those of a model whose weights are final
    and whose device and precision were chosen when it was loaded and exported.

    Attributes:
        intensity: Default strength of SWS, in [0, 1].
        session: Runs the UNet.
        config: Configuration of the UNet, as in diffusers.
    """

    def __init__(self, session: Session, config: Mapping[str, Any], intensity: float) -> None:
        self.session = session
        self.config = FrozenDict(config)
        self.intensity = intensity
        self._pipe: Any = None
        self._scheduler: Any = None
        # The scheduler whose settings were compared with those that the UNet needs.
        self._checked: Any = None
        self._trajectory: Any = None
        self._last_sigma = float("inf")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.session.contract.path.name})"

    def __getattr__(self, name: str) -> Any:
        """Raise an error that gives the reason, for attributes that only a torch UNet has.

        Raises:
            AttributeError: Always, so that `hasattr` is False.
        """
        raise AttributeError(
            f"SWSUNet has no attribute '{name}': the UNet is an exported graph, whose weights and layers "
            "cannot be read or changed; use the torch UNet for this, and export it again"
        )

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        scheduler: Any = None,
        config: Mapping[str, Any] | None = None,
        intensity: float = RECOMMENDED_INTENSITY,
        **session_options: Any,
    ) -> Self:
        """Load an artefact.

        Args:
            path: `.onnx`, `.plan` or `.engine`.
            scheduler: The scheduler of the timesteps; use `attach` if there is a pipeline.
            config: Configuration of the UNet; required if the artefact was exported from a plain .onnx graph.
            intensity: Default strength of SWS.
            session_options: See `Session.load`.

        Raises:
            EngineError: As `Session.load`; or the manifest has no configuration and none is given.
        """
        session = Session.load(path, **session_options)
        config = config or session.contract.manifest["source"].get("config")
        if config is None:
            raise EngineError(
                f"{path} was exported from a plain .onnx graph: its manifest has no configuration of the "
                "UNet; give config=, the contents of the UNet's config.json"
            )
        unet = cls(session, config, intensity)
        unet._scheduler = scheduler
        return unet

    def attach(self, pipe: Any) -> Self:
        """Replace `pipe.unet`, and use `pipe.scheduler`, also if it is replaced later.

        A scheduler or VAE that does not fit what the UNet predicts is changed, with a warning, see
        `fit_pipeline`.
        """
        for change in fit_pipeline(pipe, self._source):
            warnings.warn(change, stacklevel=2)
        pipe.unet = self
        self._pipe = pipe
        # Pipelines derive these from their UNet when they are created, possibly without one.
        size = self.config.get("sample_size")
        if hasattr(pipe, "_is_unet_config_sample_size_int"):
            pipe._is_unet_config_sample_size_int = isinstance(size, int)
        if hasattr(pipe, "default_sample_size") and size is not None:
            pipe.default_sample_size = size
        return self

    @property
    def scheduler(self) -> Any:
        """The scheduler of the timesteps; None if it is unknown."""
        return self._pipe.scheduler if self._pipe is not None else self._scheduler

    @property
    def _source(self) -> SourceEntry:
        return self.session.contract.manifest["source"]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the exported UNet."""
        dtype: torch.dtype = getattr(torch, PRECISIONS[self.session.contract.manifest["precision"]].dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        """The device of the session."""
        return torch.device(self.session.device)

    @property
    def add_embedding(self) -> SimpleNamespace:
        """The layer from which SDXL's pipelines read the number of input features."""
        features = self.config.projection_class_embeddings_input_dim
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=features))

    def eval(self) -> Self:
        """Return self: an exported UNet is in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Return self if `mode` is False.

        Raises:
            OptionError: `mode` is True.
        """
        if mode:
            raise OptionError(f"{self}: an exported graph cannot be trained; train the torch UNet")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Return self if `requires_grad` is False, as there are no gradients.

        Raises:
            OptionError: `requires_grad` is True.
        """
        if requires_grad:
            raise OptionError(f"{self}: an exported graph has no gradients; use the torch UNet")
        return self

    def to(self, *arguments: Any, **named: Any) -> Self:
        """Return self for its own device and precision; arguments as in torch.

        Raises:
            OptionError: Another device or precision.
        """
        if wrong := set(named) - {
            "device",
            "dtype",
            "non_blocking",
            "memory_format",
            "silence_dtype_warnings",
        }:
            raise TypeError(f"to() has no argument {', '.join(sorted(wrong))}")
        given = [*arguments, *(named.get(name) for name in ("device", "dtype"))]
        for value in given:
            if isinstance(value, torch.dtype) and value != self.dtype:
                raise OptionError(
                    f"{self} is exported in {self.dtype} and cannot be converted to {value}; inputs of any "
                    "precision are converted at each step. Export again with another --precision"
                )
            if isinstance(value, str | torch.device) and torch.device(value).type != self.device.type:
                raise OptionError(
                    f"{self} is loaded on {self.device.type} and cannot be moved to {value}; load it with "
                    f"SWSUNet.load(path, device='{torch.device(value).type}')"
                )
        return self

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters of the UNet that was exported; 0 if `only_trainable`.

        Raises:
            OptionError: The manifest has no number, because the source was a plain .onnx graph; or
                `exclude_embeddings`.
        """
        count = self._source.get("parameters")
        if exclude_embeddings or count is None:
            raise OptionError(f"{self}: its manifest has no such number of parameters")
        return 0 if only_trainable else count

    def reset(self) -> None:
        """Start a new trajectory at the next call, with a zero state."""
        self._trajectory = None
        self._last_sigma = float("inf")
        self.session.reset()

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        down_block_additional_residuals: Sequence[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """Predict once; arguments and result as in diffusers' `UNet2DConditionModel`.

        `cross_attention_kwargs` may contain `intensity`, a number or [B].

        Raises:
            StepError: An argument has no input in the graph, or a wrong shape.
        """
        _reject_others(others)
        intensity = _intensity(cross_attention_kwargs, self.intensity)
        scheduler = self.scheduler
        self._check_scheduler(scheduler)
        is_edm = self._source.get("prediction_type") in EDM_TYPES
        if scheduler is None and not is_edm and self._last_sigma == float("inf"):
            warnings.warn(
                "SWSUNet has no scheduler and uses the noise levels of Stable Diffusion's training; call "
                "unet.attach(pipe)",
                stacklevel=2,
            )
        timesteps = to_numpy(timestep)
        sigma = edm_noise_levels(timesteps) if is_edm else noise_levels(scheduler, timesteps)
        self._reset_at_new_trajectory(scheduler, float(sigma.max()))
        prediction = self.session.step(
            sample,
            timestep,
            encoder_hidden_states,
            sigma=sigma,
            intensity=intensity,
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            **self._added_conditions(added_cond_kwargs or {}),
            **self._residuals(down_block_additional_residuals, mid_block_additional_residual),
        )
        self._last_sigma = float(sigma.max())
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)

    @property
    def encoder_hid_proj(self) -> SimpleNamespace | None:
        """The projections of IP-Adapters, of which pipelines read number and kind; None without any."""
        adapters = ip_adapters(self.config)
        if not adapters:
            return None
        with torch.device("meta"):
            layers = [ImageProjection(adapter["width"], 1, adapter["tokens"]) for adapter in adapters]
        return SimpleNamespace(image_projection_layers=layers)

    def _added_conditions(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`added_cond_kwargs` by the names of the graph's inputs: one image embedding for each IP-Adapter."""
        conditions = dict(given)
        names = list(image_inputs(self.config))
        if names and "image_embeds" in conditions:
            embeds = conditions.pop("image_embeds")
            # As in diffusers, a tensor [B, width] instead of a list of [B, images, width] is accepted.
            each = list(embeds) if isinstance(embeds, list | tuple) else [embeds.unsqueeze(1)]
            if len(each) != len(names):
                raise StepError(
                    f"added_cond_kwargs: image_embeds has {len(each)} image embeddings, expected "
                    f"{len(names)}, one for each IP-Adapter of the graph"
                )
            conditions |= zip(names, each, strict=True)
        return conditions

    def _check_scheduler(self, scheduler: Any) -> None:
        """Reject a scheduler that was set after `attach` and does not fit what the UNet predicts."""
        if scheduler is None or scheduler is self._checked:
            return
        if missing := missing_settings(scheduler, self._source):
            settings = ", ".join(f"{name}={value!r}" for name, value in missing.items())
            kind = self._source.get("prediction_type")
            raise StepError(
                f"{self} predicts {kind}, which needs a scheduler with {settings}; "
                f"{type(scheduler).__name__} has other settings: call unet.attach(pipe) again to replace it"
            )
        self._checked = scheduler

    def _residuals(
        self, down: Sequence[torch.Tensor] | None, mid: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """ControlNet residuals by the names of the graph's inputs."""
        if down is None and mid is None:
            return {}
        if all(spec.name != MID_RESIDUAL for spec in self.session.contract.inputs):
            raise StepError(
                f"{self.session.contract.path.name} has no ControlNet inputs; export it with --controlnet"
            )
        named = {f"{DOWN_RESIDUAL}{index}": tensor for index, tensor in enumerate(down or ())}
        return named if mid is None else named | {MID_RESIDUAL: mid}

    def _reset_at_new_trajectory(self, scheduler: Any, sigma: float) -> None:
        """Reset the state if a new trajectory starts."""
        # Every call of a pipeline sets the timesteps, which creates a new tensor. The reference to the last
        # one keeps its identity from being reused.
        trajectory = getattr(scheduler, "timesteps", None)
        is_new = trajectory is not self._trajectory or sigma > self._last_sigma
        if is_new and self.session.contract.resets_per_image:
            self.session.reset()
        self._trajectory = trajectory


def _intensity(arguments: Mapping[str, Any] | None, default: float) -> Any:
    given = dict(arguments or {})
    intensity = given.pop(INTENSITY_ARGUMENT, default)
    if given:
        raise StepError(
            f"cross_attention_kwargs: {', '.join(given)} cannot be applied to an exported graph, which takes "
            f"'{INTENSITY_ARGUMENT}' only; fuse a LoRA at the export with --lora"
        )
    return intensity


def _reject_others(others: Mapping[str, Any]) -> None:
    for name, value in others.items():
        if name not in _NOT_IN_THE_GRAPH:
            raise TypeError(f"SWSUNet has no argument {name!r}")
        if value is not None:
            raise StepError(
                f"{name}{_NOT_IN_THE_GRAPH[name]}: the exported graph has no such input; use the torch UNet "
                "for this pipeline"
            )

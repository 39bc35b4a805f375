"""The MODEL of an artefact: ComfyUI's model class around it, and a ModelPatcher that loads and unloads it."""

from typing import Any

import comfy.hooks
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.supported_models
import torch
from comfy.patcher_extension import CallbacksMP

from sws_export.adapters.comfyui import Engine, SwsDiffusionModel, family_of, sampling_of, unet_config

# ComfyUI's configuration and model class of each family, and what the configuration requires.
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sd15": ("SD15", "BaseModel", {}),
    "sd20": ("SD20", "BaseModel", {}),
    "sdxl": ("SDXL", "SDXL", {"adm_in_channels": 2816}),
    "sdxl_refiner": ("SDXLRefiner", "SDXLRefiner", {"adm_in_channels": 2560}),
}
_INPAINTING_CHANNELS = 9
_KEY = "sws"
_HAS_NO_EFFECT = "it has no effect on an engine"


class SwsModelPatcher(comfy.model_patcher.ModelPatcher):
    """Reports to ComfyUI's memory management what an engine needs, and loads and unloads it on its request.

    An engine is loaded as a whole or not at all. Patches of weights give a warning.
    """

    @property
    def unet(self) -> SwsDiffusionModel:
        """The artefact."""
        return self.model.diffusion_model

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: int = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """Load the engine, and the noise schedule of the model class."""
        self.unet.engine.session()
        super().load(device_to, force_patch_weights=force_patch_weights, full_load=True)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        """Unload the engine, if its weights are to be unloaded."""
        if unpatch_weights:
            self.unet.unload()
        super().unpatch_model(device_to, unpatch_weights)

    def partially_unload(self, device_to: Any, memory_to_free: int = 0) -> int:
        """Unload the engine; returns the bytes freed."""
        freed = self.loaded_size()
        self.unet.unload()
        self.model.model_loaded_weight_memory = 0
        return freed

    def add_patches(
        self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        """Patch nothing: an engine has no weights that could be patched.

        ComfyUI passes no patches if it finds no weights under the names of a LoRA.
        """
        self.unet.warn_once(
            "a LoRA or another weight patch",
            f"{_HAS_NO_EFFECT}; apply it before 'Convert to SWS engine', or fuse it with --lora",
        )
        return []

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, Any]:
        """Reject merges with a torch model, which would ignore the engine."""
        raise ValueError(
            f"{self.unet.engine.contract.path.name} is an engine, whose weights cannot be merged or read; "
            "merge the torch models, and use 'Convert to SWS engine'"
        )

    def register_all_hook_patches(self, hooks: Any, target_dict: Any, *arguments: Any, **named: Any) -> None:
        """Warn about hooks that change weights."""
        if hooks.get_type(comfy.hooks.EnumHookType.Weight):
            self.unet.warn_once("a weight hook", _HAS_NO_EFFECT)
        super().register_all_hook_patches(hooks, target_dict, *arguments, **named)

    def set_model_attn1_replace(self, patch: Any, *arguments: Any, **named: Any) -> None:
        """Reject nodes that fail without the attention weights of a torch UNet."""
        if "nodes_sag" in patch.__module__:
            raise ValueError(
                "Self-Attention Guidance reads the attention weights of the UNet, which an engine does not "
                "return; remove it from the workflow, or use the torch model"
            )
        super().set_model_attn1_replace(patch, *arguments, **named)


class _RecordedConfig(dict[str, Any]):
    """A `unet_config` that rejects entries that the manifest does not determine."""

    def __init__(self, entries: dict[str, Any], file: str) -> None:
        super().__init__(entries)
        self._file = file

    def __missing__(self, name: str) -> Any:
        raise ValueError(
            f"{self._file}: a node reads '{name}' of the UNet's configuration, which the manifest does not "
            "have; remove the node from the workflow, or use the torch model"
        )


def model_of(engine: Engine) -> SwsModelPatcher:
    """The MODEL of an artefact; nothing is loaded yet."""
    unet = SwsDiffusionModel(engine)
    model = _base_model(unet)
    model.diffusion_model = unet
    if engine.contract.backend != "onnxruntime":
        # The memory of a step is allocated with the session, and is part of the model's size.
        model.memory_required = lambda *_, **__: 0
    patcher = SwsModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
        # ComfyUI takes 0 as unknown.
        size=max(1, engine.device_bytes()),
    )
    # ComfyUI may reuse `sample_sigmas` and conditions, so that only these callbacks separate the runs.
    patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, _KEY, lambda run: run.unet.start_run())
    patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, _KEY, lambda run: run.unet.end_run())
    return patcher


def _base_model(unet: SwsDiffusionModel) -> Any:
    """ComfyUI's model of the right family, without a UNet of its own."""
    contract = unet.engine.contract
    name, base, settings = _FAMILIES[family_of(contract)]
    config = getattr(comfy.supported_models, name)(unet_config(contract) | settings)
    config.unet_config["disable_unet_model_creation"] = True
    config.unet_config = _RecordedConfig(config.unet_config, contract.path.name)
    sampling = sampling_of(contract)
    # The dictionary of the class is shared by all models.
    config.sampling_settings = {**config.sampling_settings, **sampling.settings}
    if sampling.latents_mean is not None and sampling.latents_std is not None:
        config.latent_format = comfy.latent_formats.SDXL_Playground_2_5()
        config.latent_format.latents_mean = _per_channel(sampling.latents_mean)
        config.latent_format.latents_std = _per_channel(sampling.latents_std)
    kind = comfy.model_base.ModelType[sampling.model_type]
    model = getattr(comfy.model_base, base)(config, model_type=kind)
    if sampling.predicts_sample:
        discrete, formula = comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.X0
        model.model_sampling = type("ModelSampling", (discrete, formula), {})(config)
    sample = next(spec for spec in contract.inputs if spec.name == "sample")
    if sample.shape[1] == _INPAINTING_CHANNELS:
        model.set_inpaint()
    return model


def _per_channel(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)

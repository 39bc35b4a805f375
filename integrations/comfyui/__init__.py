"""ComfyUI node that loads exported UNets. Copy this folder to ComfyUI/custom_nodes/sws_export."""

import pathlib
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import folder_paths

from sws_export.adapters.comfyui import SwsDiffusionModel, family_of

FOLDER = "sws"
SUFFIXES = {".onnx", ".plan", ".engine"}

# ComfyUI's class of each family, and the configuration that the class requires.
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("SD15", {}),
    "sd20": ("SD20", {}),
    "sdxl": ("SDXL", {"adm_in_channels": 2816}),
    "sdxl_refiner": ("SDXLRefiner", {"adm_in_channels": 2560}),
}
_BASES = {"sdxl": "SDXL", "sdxl_refiner": "SDXLRefiner"}
_INPAINTING_CHANNELS = 9

folder_paths.folder_names_and_paths.setdefault(
    FOLDER, ([str(pathlib.Path(folder_paths.models_dir) / FOLDER)], SUFFIXES)
)


class LoadSwsEngine:
    """Outputs a MODEL whose diffusion model is an exported engine or graph."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "model_patches"
    DESCRIPTION = (
        "UNet exported by sws-export, from models/sws. At intensity 0 it is the UNet without SWS, except "
        "with --preset comfyui-node."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  (ComfyUI's name)
        """The node's inputs."""
        strength = {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "engine": (folder_paths.get_filename_list(FOLDER),),
                "intensity": ("FLOAT", strength),
            }
        }

    def load(self, engine: str, intensity: float) -> tuple[Any]:
        """The MODEL."""
        unet = SwsDiffusionModel.load(folder_paths.get_full_path_or_raise(FOLDER, engine), intensity)
        model = _base_model(unet)
        model.diffusion_model = unet
        # The session allocates its own memory, so that ComfyUI can batch the conditions as far as possible.
        model.memory_required = lambda *_, **__: 0
        return (
            comfy.model_patcher.ModelPatcher(
                model,
                load_device=comfy.model_management.get_torch_device(),
                offload_device=comfy.model_management.unet_offload_device(),
            ),
        )


def _base_model(unet: SwsDiffusionModel) -> Any:
    """ComfyUI's model of the right family, without a UNet of its own."""
    family = family_of(unet.session)
    name, settings = _FAMILIES[family]
    config = getattr(comfy.supported_models, name)(dict(settings))
    config.unet_config["disable_unet_model_creation"] = True
    base = getattr(comfy.model_base, _BASES.get(family, "BaseModel"))
    source = unet.session.contract.manifest["source"]
    predicts_v = source.get("prediction_type") == "v_prediction"
    types = comfy.model_base.ModelType
    model = base(config, model_type=types.V_PREDICTION if predicts_v else types.EPS)
    sample = next(spec for spec in unet.session.contract.inputs if spec.name == "sample")
    if sample.shape[1] == _INPAINTING_CHANNELS:
        model.set_inpaint()
    return model


NODE_CLASS_MAPPINGS = {"LoadSwsEngine": LoadSwsEngine}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadSwsEngine": "Load SWS engine"}

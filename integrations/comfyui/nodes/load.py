"""Load SWS engine, and set its intensity."""

import contextlib
import weakref
from pathlib import Path
from typing import Any

import comfy.model_management

from sws_export.adapters.comfyui import INTENSITY_OPTION, Engine

from .folders import artefacts, path_of
from .patcher import SwsModelPatcher, model_of

INTENSITY = (
    "FLOAT",
    {
        "default": 0.5,
        "min": 0.0,
        "max": 1.0,
        "step": 0.01,
        "tooltip": "Strength of SWS: 0 is the UNet without SWS, 0.5 is recommended.",
    },
)

# One session for all nodes that load the same file.
_ENGINES: "weakref.WeakValueDictionary[tuple[str, int, int], Engine]" = weakref.WeakValueDictionary()


class LoadSwsEngine:
    """Outputs a MODEL whose diffusion model is an exported engine or graph."""

    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "info")
    OUTPUT_TOOLTIPS = (
        "Connect to 'Set SWS intensity' or a sampler.",
        "Runtime, precision, method, and the sizes that the engine takes.",
    )
    FUNCTION = "load"
    CATEGORY = "model_patches"
    DESCRIPTION = (
        "Loads a UNet that sws-export exported, from models/sws or models/tensorrt. Text encoder and VAE "
        "come from the usual loaders."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  (ComfyUI's name)
        """The node's inputs."""
        tooltip = "An .onnx, .plan or .engine of sws-export, with its .json file beside it."
        return {
            "required": {"engine": (artefacts(), {"tooltip": tooltip})},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, engine: str, **_: Any) -> tuple[str, int, int]:  # noqa: N802  (ComfyUI's name)
        """The file's identity."""
        return _identity(path_of(engine))

    def load(self, engine: str, unique_id: str | None = None) -> tuple[SwsModelPatcher, str]:
        """The MODEL, and its description."""
        model = model_from(path_of(engine))
        info = model.unet.engine.summary()
        show(unique_id, info)
        return model, info


class SetSwsIntensity:
    """Sets the intensity of a loaded engine without loading it again."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "set"
    CATEGORY = "model_patches"
    DESCRIPTION = "Sets the strength of SWS of a MODEL from 'Load SWS engine' or 'Convert to SWS engine'."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  (ComfyUI's name)
        """The node's inputs."""
        tooltip = "A MODEL of 'Load SWS engine' or 'Convert to SWS engine'."
        return {"required": {"model": ("MODEL", {"tooltip": tooltip}), "intensity": INTENSITY}}

    def set(self, model: Any, intensity: float) -> tuple[Any]:
        """The MODEL with the intensity."""
        if not isinstance(model, SwsModelPatcher):
            raise ValueError(
                "Set SWS intensity: expected a MODEL from 'Load SWS engine' or 'Convert to SWS engine', "
                f"found {type(model.model).__name__} in torch; for that use 'Sigma-Weighted Shuffle (live)'"
            )
        if not model.unet.engine.contract.takes_intensity:
            raise ValueError(
                f"Set SWS intensity: {model.unet.engine.contract.path.name} was exported with --plain and "
                "contains no SWS"
            )
        changed = model.clone()
        changed.model_options["transformer_options"][INTENSITY_OPTION] = float(intensity)
        return (changed,)


def model_from(path: Path) -> SwsModelPatcher:
    """The MODEL of a file; the session is shared with other nodes that load it."""
    identity = _identity(path)
    engine = _ENGINES.get(identity)
    if engine is None:
        on_cpu = comfy.model_management.get_torch_device().type == "cpu"
        # Engines need a GPU, and raise an error without one; a graph runs where ComfyUI runs.
        options = {"device": "cpu"} if on_cpu and path.suffix == ".onnx" else {}
        engine = _ENGINES[identity] = Engine.open(path, **options)
    return model_of(engine)


def show(unique_id: str | None, text: str) -> None:
    """Show a line on the node, where the version of ComfyUI can do that."""
    with contextlib.suppress(ImportError, AttributeError):
        from server import PromptServer

        if unique_id is not None:
            PromptServer.instance.send_progress_text(text, unique_id)


def _identity(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns

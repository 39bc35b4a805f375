"""Which of ComfyUI's models an exported UNet belongs to, and how it is sampled."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sws_export.adapters.comfyui.inputs import count_sizes
from sws_export.errors import StepError
from sws_export.runtime.contract import Contract

_REFINER_SIZES = 5
_MODEL_TYPES = {
    None: "EPS",
    "epsilon": "EPS",
    "v_prediction": "V_PREDICTION",
    "edm": "EDM",
    "edm_v_prediction": "V_PREDICTION_EDM",
    "sample": "EPS",
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How ComfyUI samples with a UNet.

    Attributes:
        model_type: Name of a member of `comfy.model_base.ModelType`.
        predicts_sample: The output is the denoised sample, for which ComfyUI has no model type: `EPS` with
            the formula of `comfy.model_sampling.X0`.
        settings: Entries of a model configuration's `sampling_settings`.
        latents_mean: Mean of each channel of the VAE's latents; None if they are only scaled.
        latents_std: Their standard deviations.
    """

    model_type: str
    predicts_sample: bool
    settings: Mapping[str, Any]
    latents_mean: tuple[float, ...] | None
    latents_std: tuple[float, ...] | None


def family_of(contract: Contract) -> str:
    """Which of ComfyUI's models the UNet belongs to, from its inputs: sd15, sd20, sdxl or sdxl_refiner.

    Raises:
        StepError: The width of the text embeddings, or of `y`, is not that of a Stable Diffusion model.
    """
    shapes = {spec.name: spec.shape for spec in contract.inputs}
    sizes = None
    if "time_ids" in shapes:
        sizes = shapes["time_ids"][1]
    elif "y" in shapes:
        # A graph that was made from ComfyUI's own ONNX export.
        sizes = count_sizes(shapes["y"])
    if sizes is not None:
        return "sdxl_refiner" if sizes == _REFINER_SIZES else "sdxl"
    width = shapes["encoder_hidden_states"][2]
    known = {768: "sd15", 1024: "sd20"}
    if width not in known:
        raise StepError(
            f"{contract.path.name}: the node supports text embeddings of width 768 (SD 1), 1024 "
            f"(SD 2) and SDXL, found width {width}"
        )
    return known[int(width)]


def sampling_of(contract: Contract) -> Sampling:
    """How to sample, from the manifest: see `sws_export.checkpoint.prediction` for the formulas.

    A manifest without a prediction type, such as that of a graph made from a graph, is one of epsilon.

    Raises:
        StepError: The prediction type is unknown.
    """
    source = contract.manifest["source"]
    kind = source.get("prediction_type")
    if kind not in _MODEL_TYPES:
        known = ", ".join(name for name in _MODEL_TYPES if name)
        raise StepError(
            f"{contract.path.name}: prediction type '{kind}' is unknown; the node supports {known}"
        )
    recorded: Mapping[str, Any] = source.get("sampling") or {}
    settings: dict[str, Any] = {
        name: recorded[name] for name in ("sigma_data", "sigma_min", "sigma_max") if name in recorded
    }
    if recorded.get("zero_terminal_snr"):
        settings["zsnr"] = True
    return Sampling(
        model_type=_MODEL_TYPES[kind],
        predicts_sample=kind == "sample",
        settings=settings,
        latents_mean=_channels(recorded.get("latents_mean")),
        latents_std=_channels(recorded.get("latents_std")),
    )


def _channels(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


def unet_config(contract: Contract) -> dict[str, Any]:
    """The entries of ComfyUI's `unet_config`, which some of its nodes read.

    Empty where the manifest has no configuration.
    """
    config = contract.manifest["source"].get("config")
    return unet_config_of(config) if config else {}


def unet_config_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ComfyUI's `unet_config` for a diffusers configuration.

    Lists of blocks are as in ComfyUI's `model_detection`: one entry for each residual block, the first level
    first.
    """
    channels = config["block_out_channels"]
    levels = len(channels)
    layers = config["layers_per_block"]
    blocks = [layers] * levels if isinstance(layers, int) else list(layers)
    depths = config.get("transformer_layers_per_block") or 1
    depths = [depths] * levels if isinstance(depths, int) else list(depths)
    has_attention = ["CrossAttn" in kind for kind in config["down_block_types"]]
    depth = [count if attends else 0 for count, attends in zip(depths, has_attention, strict=True)]
    down, up = [], []
    for count, repeated in zip(depth, blocks, strict=True):
        down += [count] * repeated
        up += [count] * (repeated + 1)
    found = {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "num_res_blocks": blocks,
        "channel_mult": [width // channels[0] for width in channels],
        "transformer_depth": down,
        "transformer_depth_output": up,
        "transformer_depth_middle": depth[-1] or depths[-1],
        "context_dim": config["cross_attention_dim"],
        "use_linear_in_transformer": bool(config.get("use_linear_projection")),
        "use_spatial_transformer": True,
    }
    if config.get("projection_class_embeddings_input_dim"):
        found["adm_in_channels"] = config["projection_class_embeddings_input_dim"]
    return found

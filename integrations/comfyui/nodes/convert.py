"""Convert to SWS engine: exports a MODEL as it is loaded, with its LoRAs and merges."""

import hashlib
import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.utils
import folder_paths
import psutil
import torch

from sws_export.engines.events import EventReader
from sws_export.errors import SwsExportError
from sws_export.tensors import parse_range

from .folders import output_folder
from .load import model_from, show
from .patcher import SwsModelPatcher

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_BAR = 1000
# Per latent element, in all models that ComfyUI runs with this kind of UNet.
_PIXELS = 8
_FORMATS = {
    "TensorRT for RTX engine": ("tensorrt-rtx", ".plan"),
    "TensorRT engine": ("tensorrt", ".plan"),
    "ONNX graph": (None, ".onnx"),
}
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Python of another environment that has the extra `export`, where ComfyUI's has not.
_PYTHON = "SWS_EXPORT_PYTHON"


class ConvertToSwsEngine:
    """Exports in a child process, and outputs the artefact as a MODEL."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "convert"
    CATEGORY = "model_patches"
    DESCRIPTION = (
        "Exports the MODEL, with the LoRAs and merges that are applied to it, as an engine or ONNX graph "
        "with Sigma-Weighted Shuffle to models/sws, and outputs it. The same weights and settings are "
        "converted once. Needs the extra 'export' of sws-export."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  (ComfyUI's name)
        """The node's inputs."""

        def sizes(default: str, what: str) -> tuple[str, dict[str, Any]]:
            tooltip = f"{what}: one number, or smallest:best:largest, as in {default}."
            return "STRING", {"default": default, "tooltip": tooltip}

        precisions = ["as the model", *_DTYPES.values()]
        return {
            "required": {
                "model": (
                    "MODEL",
                    {"tooltip": "A UNet in torch: SD 1, SD 2, SDXL and models derived from them."},
                ),
                "name": ("STRING", {"default": "unet", "tooltip": "First part of the file's name."}),
                "format": (
                    list(_FORMATS),
                    {"tooltip": "An engine needs the library of that name, and its GPU."},
                ),
                "precision": (precisions, {"tooltip": "Precision of the exported UNet."}),
                "batch": sizes("1:2:4", "Latents times conditions; both prompts of one image are 2"),
                "height": sizes("512:512:1024", "Pixels"),
                "width": sizes("512:512:1024", "Pixels"),
                "tokens": sizes("77:77:154", "Text tokens; 77 for each chunk of a prompt"),
                "controlnet": ("BOOLEAN", {"default": False, "tooltip": "Add inputs for a ControlNet."}),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def convert(self, model: Any, name: str, unique_id: str | None = None, **settings: Any) -> tuple[Any]:
        """The artefact as a MODEL."""
        _check(model)
        comfy.model_management.load_models_gpu([model], force_patch_weights=True)
        weights = _weights(model)
        backend, suffix = _FORMATS[settings.pop("format")]
        request = _request(model, backend, settings)
        stem = re.sub(r"[^\w.-]+", "_", name).strip("._") or "unet"
        out = output_folder() / f"{stem}-{_digest(weights, request)}{suffix}"
        if not out.is_file():
            with tempfile.TemporaryDirectory(dir=_temporary_folder()) as directory:
                file = Path(directory) / f"{stem}.safetensors"
                comfy.utils.save_torch_file(weights, str(file))
                del weights
                if backend is not None:
                    # The builder needs the memory of the GPU.
                    comfy.model_management.unload_all_models()
                    comfy.model_management.soft_empty_cache()
                _run(request | {"model": str(file), "out": str(out)}, unique_id)
        loaded = model_from(out)
        show(unique_id, f"{out.name}: {loaded.unet.engine.summary()}")
        return (loaded,)


def _check(model: Any) -> None:
    """Reject what cannot be exported, and warn about patches that are not weights."""
    if isinstance(model, SwsModelPatcher):
        raise ValueError("Convert to SWS engine: the MODEL is an engine already; connect a model in torch")
    unet = model.model.diffusion_model
    if not hasattr(unet, "output_blocks"):
        raise ValueError(
            f"Convert to SWS engine: {type(unet).__name__} is not a UNet; connect an SD 1, SD 2 or SDXL model"
        )
    options = model.model_options["transformer_options"]
    ignored = [name for kind in ("patches", "patches_replace") for name in options.get(kind, {})]
    if ignored:
        _LOG.warning(
            "Convert to SWS engine: %s are functions and cannot be exported; the artefact is without them",
            ", ".join(ignored),
        )


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """The UNet's weights in the original layout, with the marker tensors of its prediction type."""
    real = model.model
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in real.state_dict_for_saving().items()
    }
    types, sampling = comfy.model_base.ModelType, real.model_sampling
    if getattr(sampling, "zsnr", False):
        weights["ztsnr"] = torch.ones(1)
    if real.model_type == types.V_PREDICTION:
        weights["v_pred"] = torch.ones(1)
    elif real.model_type == types.V_PREDICTION_EDM:
        weights["edm_vpred.sigma_max"] = sampling.sigma_max.detach().cpu().reshape(1)
        weights["edm_vpred.sigma_min"] = sampling.sigma_min.detach().cpu().reshape(1)
    elif real.model_type == types.EDM:
        weights["edm_mean"] = real.latent_format.latents_mean.contiguous()
        weights["edm_std"] = real.latent_format.latents_std.contiguous()
    elif real.model_type != types.EPS:
        raise ValueError(
            f"Convert to SWS engine: models of the type {real.model_type.name} are not supported; supported "
            "are EPS, V_PREDICTION, EDM and V_PREDICTION_EDM"
        )
    return weights


def _request(model: Any, backend: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What the child process exports, without the files."""
    precision = settings["precision"]
    if precision == "as the model":
        precision = _DTYPES.get(model.model_dtype(), "fp16")
    sizes: dict[str, Any] = {"vae_scale": _PIXELS}
    for name in ("batch", "height", "width", "tokens"):
        if text := settings[name].strip():
            size = parse_range(text, name)
            # In a graph, a range is a dynamic size.
            if backend is not None or size.minimum == size.maximum:
                sizes[name] = text
    return {
        "source": {
            "precision": precision,
            "controlnet": settings["controlnet"],
            "attention_head_dim": _heads(model.model.model_config.unet_config),
        },
        "sws": {},
        "sizes": sizes,
        "engine": {},
        "backend": backend,
    }


def _heads(config: dict[str, Any]) -> list[int]:
    """Attention heads of each level, which the shapes of the weights do not determine."""
    if config.get("num_heads", -1) != -1:
        return [config["num_heads"]]
    size = config["num_head_channels"]
    return [max(1, config["model_channels"] * factor // size) for factor in config["channel_mult"]]


def _digest(weights: dict[str, torch.Tensor], request: dict[str, Any]) -> str:
    """Identifies the content: weights, settings and version."""
    version = importlib.metadata.version("sws-export")
    digest = hashlib.sha256(json.dumps([version, request], sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def _temporary_folder() -> Path:
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(request: dict[str, Any], unique_id: str | None) -> None:
    """Run the child process, with ComfyUI's progress bar.

    Raises:
        SwsExportError: The export failed.
        InterruptProcessingException: The user cancelled; nothing is left of the export.
    """
    command = [os.environ.get(_PYTHON) or sys.executable, "-m", "sws_export.adapters.convert_process"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps(request | {"parent": os.getpid()}).encode())
        child.stdin.close()
        _follow(child, EventReader(child.stdout), unique_id)
    finally:
        _end(child)


def _follow(child: subprocess.Popen[bytes], events: EventReader, unique_id: str | None) -> None:
    """Show the progress until the process ends."""
    bar = comfy.utils.ProgressBar(_BAR)
    done, total, stage = 0.0, None, ""
    while True:
        comfy.model_management.throw_exception_if_processing_interrupted()
        try:
            event = events.next_event(_POLL_SECONDS)
        except EOFError:
            code = child.wait()
            raise SwsExportError(
                f"the export ended with exit code {code} before it was complete; the log has its output"
            ) from None
        if event is None:
            continue
        kind = event["event"]
        if kind == "finished":
            bar.update_absolute(_BAR, _BAR)
            return
        if kind == "failed":
            raise SwsExportError(event["message"])
        if kind == "stage":
            done, total, stage = 0.0, event["total"], event["name"]
            show(unique_id, stage)
        elif kind == "advance":
            done += event["amount"]
        elif kind == "describe":
            show(unique_id, f"{stage}: {event['text']}")
        else:
            _LOG.log(logging.WARNING if kind == "warn" else logging.INFO, "%s", event["text"])
        bar.update_absolute(int(_BAR * min(done / total, 1.0)) if total else 0, _BAR)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the process and those that it started, such as an engine build."""
    if child.poll() is not None:
        return
    started = psutil.Process(child.pid).children(recursive=True)
    child.kill()
    for process in started:
        if process.is_running():
            process.kill()
    child.wait()

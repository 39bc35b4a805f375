"""Finds out what a UNet predicts.

The first of these that is present: the user's option; the scheduler of the pipeline; marker tensors or
metadata of the file; for Stable Diffusion 2.x a property of its weights. Otherwise epsilon is assumed.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from sws_export.checkpoint.config import read_json
from sws_export.checkpoint.header import Header, StoredTensor
from sws_export.checkpoint.prediction import EDM_PREDICTIONS, Prediction
from sws_export.checkpoint.schemas import SchedulerConfig
from sws_export.checkpoint.structure import Structure
from sws_export.checkpoint.weights import read_array
from sws_export.errors import CheckpointError

# ComfyUI distinguishes SD 2.1 with v-prediction by the standard deviation of this bias, in
# comfy/supported_models.py, SD20.model_type. Names in diffusers' and in the original layout.
_SD2_BIASES = (
    "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
    "output_blocks.11.1.transformer_blocks.0.norm1.bias",
)
_SD2_V_DEVIATION = 0.09
_SD2_CONTEXT = 1024
_MAX_MARKER_VALUES = 1024
_MAX_BIAS_VALUES = 2**20


def find_prediction(
    given: str | None,
    scheduler: Path | None,
    header: Header,
    structure: Structure | None,
    stored: Mapping[str, StoredTensor],
) -> Prediction:
    """Find the prediction of a UNet.

    Args:
        given: The user's `--prediction-type`, or None.
        scheduler: The pipeline's scheduler_config.json, or None.
        header: Header of the file that contains the UNet, with tensors of other parts.
        structure: The UNet's structure, or None if it cannot be read.
        stored: The UNet's tensors without prefix.

    Raises:
        CheckpointError: The scheduler's configuration or a marker tensor cannot be read.
    """
    found = (
        _of_scheduler(scheduler)
        or _of_markers(header)
        or _of_metadata(header)
        or _of_sd2(structure, stored)
        or Prediction("epsilon", None)
    )
    if given is None or given == found.type:
        return found
    if given in EDM_PREDICTIONS:
        return replace(EDM_PREDICTIONS[given], source="--prediction-type")
    return Prediction(given, "--prediction-type", zero_terminal_snr=found.zero_terminal_snr)


def _of_scheduler(file: Path | None) -> Prediction | None:
    if file is None:
        return None
    content = read_json(file, SchedulerConfig)
    # The default of every diffusers scheduler that has this option is epsilon.
    kind = content.get("prediction_type") or "epsilon"
    zero = bool(content.get("rescale_betas_zero_snr", False))
    found = Prediction(kind, file.name, zero_terminal_snr=zero)
    if not content.get("_class_name", "").startswith("EDM"):
        return found
    # diffusers' EDM schedulers call the two kinds epsilon and v_prediction.
    edm = EDM_PREDICTIONS["edm_v_prediction" if kind == "v_prediction" else "edm"]
    return replace(
        edm,
        source=file.name,
        sigma_data=content.get("sigma_data") or edm.sigma_data,
        sigma_min=content.get("sigma_min") or edm.sigma_min,
        sigma_max=content.get("sigma_max") or edm.sigma_max,
    )


def _of_markers(header: Header) -> Prediction | None:
    """Marker tensors: a convention of the models' authors, which ComfyUI reads."""
    tensors = header.tensors
    if "edm_mean" in tensors and "edm_std" in tensors:
        mean, std = (_marker(name, tensors[name]) for name in ("edm_mean", "edm_std"))
        return replace(
            EDM_PREDICTIONS["edm"],
            source="marker tensors edm_mean, edm_std",
            latents_mean=mean,
            latents_std=std,
        )
    if "edm_vpred.sigma_max" in tensors:
        edm = EDM_PREDICTIONS["edm_v_prediction"]
        smallest = tensors.get("edm_vpred.sigma_min")
        return replace(
            edm,
            source="marker tensor edm_vpred.sigma_max",
            sigma_min=edm.sigma_min if smallest is None else _marker("edm_vpred.sigma_min", smallest)[0],
            sigma_max=_marker("edm_vpred.sigma_max", tensors["edm_vpred.sigma_max"])[0],
        )
    if "v_pred" in tensors:
        markers = ", ".join(name for name in ("v_pred", "ztsnr") if name in tensors)
        return Prediction("v_prediction", f"marker {markers}", zero_terminal_snr="ztsnr" in tensors)
    return None


def _marker(name: str, stored: StoredTensor) -> tuple[float, ...]:
    """The values of a marker tensor.

    Raises:
        CheckpointError: It has none or too many, or one is not finite.
    """
    count = math.prod(stored.shape)
    if not 1 <= count <= _MAX_MARKER_VALUES:
        raise CheckpointError(
            f"{stored.file}: marker tensor '{name}' has {count} values, expected 1 to {_MAX_MARKER_VALUES}"
        )
    values = tuple(float(value) for value in read_array(stored).reshape(-1))
    if not all(map(math.isfinite, values)):
        raise CheckpointError(f"{stored.file}: marker tensor '{name}' contains NaN or Inf")
    return values


def _of_metadata(header: Header) -> Prediction | None:
    """Metadata as in https://github.com/Stability-AI/ModelSpec."""
    recorded = header.metadata.get("modelspec.prediction_type", "")
    kind = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}.get(recorded)
    if kind is None:
        return None
    zero = header.metadata.get("ss_zero_terminal_snr") == "True" or "ztsnr" in header.tensors
    return Prediction(kind, "metadata modelspec.prediction_type", zero_terminal_snr=zero)


def _of_sd2(structure: Structure | None, stored: Mapping[str, StoredTensor]) -> Prediction | None:
    """Stable Diffusion 2.x, whose versions for 512 and 768 pixels differ in values only."""
    if structure is None or structure.context != _SD2_CONTEXT or structure.in_channels != 4:
        return None
    bias = next((stored[name] for name in _SD2_BIASES if name in stored), None)
    if bias is None or math.prod(bias.shape) > _MAX_BIAS_VALUES:
        return None
    deviation = float(np.std(read_array(bias)))
    kind = "v_prediction" if deviation > _SD2_V_DEVIATION else "epsilon"
    relation = ">" if deviation > _SD2_V_DEVIATION else "<="
    source = f"inferred from weights as in ComfyUI: deviation {deviation:.3f} {relation} {_SD2_V_DEVIATION}"
    return Prediction(kind, f"{source}; --prediction-type overrides it")

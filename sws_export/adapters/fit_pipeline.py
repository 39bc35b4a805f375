"""Settings of a diffusers pipeline that depend on what the UNet predicts, as the manifest records it."""

import math
from collections.abc import Mapping
from typing import Any

from sws_export.errors import OptionError
from sws_export.manifest import SourceEntry

# diffusers' EDM schedulers call the two kinds epsilon and v_prediction.
EDM_TYPES: Mapping[str, str] = {"edm": "epsilon", "edm_v_prediction": "v_prediction"}
_EDM_SETTINGS = ("sigma_data", "sigma_min", "sigma_max")


def fit_pipeline(pipe: Any, source: SourceEntry) -> list[str]:
    """Set scheduler and VAE of `pipe` to what the UNet was trained with; returns the changes in words.

    A pipeline around another UNet, or one made from a single file, often has the scheduler of Stable
    Diffusion 1. The scheduler is replaced by one of the same class where that class has the settings, and by
    `EDMEulerScheduler` for `edm` and `edm_v_prediction`. The latents of a UNet with `latents_mean` and
    `latents_std` are normalized to standard deviation `sigma_data`, which the VAE's configuration must undo.

    Raises:
        OptionError: The UNet is no EDM model and the scheduler is an EDM scheduler.
    """
    changes = []
    missing = missing_settings(pipe.scheduler, source)
    if missing:
        old, pipe.scheduler = pipe.scheduler, _fitting_scheduler(pipe.scheduler, source, missing)
        settings = ", ".join(f"{name}={value}" for name, value in missing.items())
        changes.append(
            f"the UNet predicts {source.get('prediction_type')}: scheduler {type(old).__name__} replaced by "
            f"{type(pipe.scheduler).__name__} with {settings}"
        )
    vae = getattr(pipe, "vae", None)
    latents = _latent_settings(source)
    if vae is not None and any(_differs(vae.config.get(name), value) for name, value in latents.items()):
        vae.register_to_config(**latents)
        changes.append(f"the UNet takes normalized latents: set {', '.join(latents)} of the VAE")
    return changes


def missing_settings(scheduler: Any, source: SourceEntry) -> dict[str, Any]:
    """Settings that the UNet needs and `scheduler` has not.

    Nothing for `epsilon`, which the manifest also has for checkpoints that do not specify their prediction.
    """
    kind = source.get("prediction_type")
    sampling: Mapping[str, Any] = source.get("sampling", {})
    if kind in (None, "epsilon"):
        return {}
    wanted: dict[str, Any] = {"prediction_type": EDM_TYPES.get(str(kind), kind)}
    if kind in EDM_TYPES:
        wanted |= {name: sampling[name] for name in _EDM_SETTINGS if name in sampling}
        if not _is_edm(scheduler):
            return wanted
    elif sampling.get("zero_terminal_snr") and scheduler.config.get("rescale_betas_zero_snr") is False:
        # The first timestep must be the last one of training, which has no signal.
        wanted |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {name: value for name, value in wanted.items() if _differs(scheduler.config.get(name), value)}


def _fitting_scheduler(scheduler: Any, source: SourceEntry, missing: Mapping[str, Any]) -> Any:
    kind = source.get("prediction_type")
    if (kind in EDM_TYPES) == _is_edm(scheduler):
        return type(scheduler).from_config(scheduler.config, **missing)
    if kind in EDM_TYPES:
        from diffusers import EDMEulerScheduler

        return EDMEulerScheduler(**missing)
    raise OptionError(
        f"the UNet predicts {kind}, and {type(scheduler).__name__} is for EDM models; use another scheduler, "
        "such as EulerDiscreteScheduler"
    )


def _latent_settings(source: SourceEntry) -> dict[str, Any]:
    sampling: Mapping[str, Any] = source.get("sampling", {})
    if "latents_mean" not in sampling or "latents_std" not in sampling:
        return {}
    settings = {name: list(sampling[name]) for name in ("latents_mean", "latents_std")}
    return settings | {"scaling_factor": sampling.get("sigma_data", 1.0)}


def _is_edm(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("EDM")


def _differs(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return found is None or any(_differs(one, other) for one, other in zip(found, wanted, strict=True))
    if isinstance(wanted, float) and isinstance(found, int | float):
        return not math.isclose(found, wanted, rel_tol=1e-4)
    return bool(found != wanted)

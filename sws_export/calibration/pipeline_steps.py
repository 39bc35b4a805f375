"""Inputs of a UNet, recorded while a diffusers pipeline draws images."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sws_export.calibration.pipeline_class import check_components, pipeline_class
from sws_export.errors import CheckpointError, OptionError
from sws_export.noise_levels import noise_levels
from sws_export.progress import Progress
from sws_export.runtime.inputs import to_numpy
from sws_export.runtime.session import RECOMMENDED_INTENSITY
from sws_export.tensors import DOWN_RESIDUAL, MID_RESIDUAL, TensorSpec, concrete_shape
from sws_export.validation.trajectory import Array

STEPS = 8
_RESIDUALS = (DOWN_RESIDUAL, MID_RESIDUAL)


def check_pipeline(pipeline: Path, *, trust_code: bool) -> Any:
    """The class of a pipeline that can be loaded; its weights are not read.

    Args:
        pipeline: A diffusers pipeline directory with its UNet.
        trust_code: Import `pipeline.py` of the directory if diffusers does not have its class.

    Raises:
        CheckpointError: The directory is not a pipeline, or a component cannot be loaded.
        OptionError: The class is in `pipeline.py`, which is not trusted.
    """
    kind = pipeline_class(pipeline, trust_code=trust_code)
    check_components(pipeline, own_code=not kind.__module__.startswith("diffusers."))
    return kind


def record_steps(
    pipeline: Path,
    prompts: Sequence[str],
    specs: Sequence[TensorSpec],
    progress: Progress,
    *,
    trust_code: bool,
    steps: int = STEPS,
) -> list[Mapping[str, Array]]:
    """Draw one image for each prompt, and return the inputs of every call of the UNet.

    Args:
        pipeline: A diffusers pipeline directory with its UNet; nothing is downloaded.
        prompts: The prompts.
        specs: Inputs of the UNet.
        progress: Receives each prompt.
        trust_code: Import `pipeline.py` of the directory if diffusers does not have its class.
        steps: Steps of the pipeline for each prompt.

    Raises:
        CheckpointError: diffusers cannot load the pipeline, or its UNet has other inputs.
        OptionError: The pipeline rejects a prompt.
    """
    import torch
    from diffusers.utils import logging

    kind = check_pipeline(pipeline, trust_code=trust_code)
    # Our own progress replaces it.
    logging.disable_progress_bar()
    try:
        pipe = kind.from_pretrained(
            pipeline, local_files_only=True, low_cpu_mem_usage=False, use_safetensors=True
        )
    except Exception as error:  # configurations and weights of components can be malformed in many ways
        raise CheckpointError(f"diffusers cannot load the pipeline {pipeline}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    if any(spec.name.startswith(_RESIDUALS) for spec in specs):
        progress.warn(
            f"the residuals of a ControlNet are 0 in the calibration over {pipeline.name}: activations that "
            "they enlarge will be clipped"
        )
    found: list[Mapping[str, Array]] = []

    def record(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        arguments = inspect.signature(module.forward).bind(*given, **named).arguments
        found.append(_inputs(arguments, specs, pipe.scheduler, pipeline))

    pipe.unet.register_forward_pre_hook(record, with_kwargs=True)
    with progress.stage("record", total=len(prompts)) as stage, torch.no_grad():
        for seed, prompt in enumerate(prompts):
            stage.describe(prompt)
            generator = torch.Generator().manual_seed(seed)
            try:
                pipe(prompt, num_inference_steps=steps, generator=generator, output_type="np")
            except ValueError as error:
                raise OptionError(
                    f"{pipeline}: the pipeline rejects the prompt '{prompt}': {error}"
                ) from error
            stage.advance()
    return found


def _inputs(
    arguments: Mapping[str, Any], specs: Sequence[TensorSpec], scheduler: Any, pipeline: Path
) -> dict[str, Array]:
    """The inputs of the graph for one call of the UNet."""
    named = {**arguments, **(arguments.get("added_cond_kwargs") or {})}
    batch, _, height, width = named["sample"].shape
    tokens = named["encoder_hidden_states"].shape[1]
    sizes = {"batch": batch, "height": height, "width": width, "tokens": tokens}
    timestep = np.broadcast_to(to_numpy(named["timestep"]), (batch,))
    sigma = np.broadcast_to(noise_levels(scheduler, timestep), (batch,))
    found: dict[str, Array] = {
        "timestep": np.asarray(timestep, np.float64),
        "sigma": np.asarray(sigma, np.float64),
        "intensity": np.full(batch, RECOMMENDED_INTENSITY),
    }
    for spec in specs:
        if spec.name in found:
            continue
        value = named.get(spec.name)
        if value is not None:
            found[spec.name] = to_numpy(value)
        elif spec.name.startswith(_RESIDUALS):
            found[spec.name] = np.zeros(concrete_shape(spec, sizes))
        else:
            raise CheckpointError(
                f"{pipeline}: its UNet is called without {spec.name}, an input of the graph"
            )
        _check_shape(pipeline, spec, found[spec.name].shape)
    return found


def _check_shape(pipeline: Path, spec: TensorSpec, found: tuple[int, ...]) -> None:
    fits = len(found) == len(spec.shape) and all(
        isinstance(expected, str) or size == expected
        for size, expected in zip(found, spec.shape, strict=True)
    )
    if not fits:
        raise CheckpointError(
            f"{pipeline}: its UNet is called with {spec.name} of shape {list(found)}, the exported one takes "
            f"[{', '.join(map(str, spec.shape))}]: give the pipeline that the UNet belongs to"
        )

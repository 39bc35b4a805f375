"""The torch cases of benchmarks/step.py: plain UNet, eager reference, and attention as in the node."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from step_cases import MODELS, Case
from step_work import inputs_for, measure


def run_torch(checkpoint_path: Path, case: Case, threads: int) -> dict[str, Any]:
    """Measure a float32 step: plain, the reference, or with attention computed as the published node does."""
    import torch

    from graph_passes.parameters import SwsParameters
    from sws_export.checkpoint import open_checkpoint
    from sws_export.checkpoint.unet_io import unet_inputs
    from sws_export.checkpoint.unet_module import call_unet, load_unet, unet_arguments
    from sws_export.reference import ReferenceUNet, attention

    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(checkpoint_path)
    unet = load_unet(checkpoint, torch.float32)
    for module in unet.modules():
        if hasattr(module, "to_q") and hasattr(module, "scale"):
            # The graphs have the same factor on their logits.
            module.to_q.weight.data *= MODELS[case.model].logits
    shapes = {spec.name: (list(spec.shape), np.float32) for spec in unet_inputs(checkpoint.config, "float32")}
    inputs = {name: torch.from_numpy(value) for name, value in inputs_for(shapes, case).items()}
    if case.form == "plain":
        with torch.no_grad():
            return measure(lambda: call_unet(unet, inputs), case.repeats)
    if case.form == "comfyui-node":
        attention.row_entropies = _stored_entropies
        attention.largest_mixing = _stored_mixing
        attention.kl_divergence = _no_divergence
    reference = ReferenceUNet(unet, SwsParameters())
    sigma, intensity = (torch.full((case.batch,), value) for value in (case.sigma, case.intensity))
    arguments = unet_arguments(inputs)
    return measure(lambda: reference.step(sigma=sigma, intensity=intensity, **arguments), case.repeats)


def _stored_entropies(q: Any, k: Any) -> Any:
    """As in the node: logits of all heads at once, and a softmax over them."""
    log_a0 = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).log_softmax(-1)
    return -(log_a0.exp() * log_a0).sum(-1)


def _stored_mixing(q: Any, k: Any, kp: Any, limit: Any, kappa: Any, parameters: Any) -> Any:
    """As in the node: attention over all heads in each bisection step."""
    import torch

    scale = 1 / math.sqrt(q.shape[-1])
    log_a0 = (q @ k.transpose(-1, -2) * scale).log_softmax(-1)
    low, high = torch.zeros_like(limit), limit
    for _ in range(parameters.bisection_steps):
        middle = (low + high) / 2
        mixed = k + middle[:, None, None, None] * (kp - k)
        log_a = (q @ mixed.transpose(-1, -2) * scale).log_softmax(-1)
        within = (log_a.exp() * (log_a - log_a0)).sum(-1).mean((1, 2)) <= kappa
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return low


def _no_divergence(*arguments: Any) -> Any:
    """Skip the KL divergence at the result, which the reference reports and the node does not compute."""
    return arguments[-1]

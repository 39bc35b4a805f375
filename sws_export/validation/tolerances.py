"""Tolerances of the outputs of a graph against the reference."""

from collections.abc import Mapping, Sequence

import numpy as np

from graph_passes.debug_outputs import PREFIX
from graph_passes.weight_formats import WeightFormat
from sws_export.tensors import Precision
from sws_export.validation.onnx_runner import is_state
from sws_export.validation.sws_spec import SwsSpec
from sws_export.validation.trajectory import Array

# Tolerance of the prediction, relative to its largest absolute value.
_PREDICTION: dict[Precision, float] = {"fp32": 2e-4, "fp16": 5e-3, "bf16": 2e-2}
# If the KL budget limits the mixing, rounding can move the result of the bisection by one interval.
_PREDICTION_AT_BUDGET = 5e-4
# A guard on a share of the query rows finds a different mixing share. This tolerance does not assess the
# effect on image quality.
_SAMPLED_ROWS = 5e-2
_STATE = 1e-5
_SITE_METRIC: dict[Precision, float] = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 2e-2}
# With 8-bit weights, and with 8-bit activations, too: 1.3 to 1.6 times the largest error measured on several
# UNets, except that of fp8 weights of SDXL (docs/engines.md, benchmarks/quantization.py). Most UNets have
# random weights, which round worse than trained ones.
_PREDICTION_WEIGHTS: dict[WeightFormat, float] = {"int8": 1e-1, "fp8": 2.5e-1}
_PREDICTION_ACTIVATIONS: dict[WeightFormat, float] = {"int8": 2e-1, "fp8": 3.5e-1}
# Site metrics that are not compared if the guard evaluates a share of the query rows.
_SET_BY_GUARD = ("alpha_k", "a_v", "kl")
# Exponents of alpha_k in the metrics that move with the last interval of the bisection.
_POWERS_OF_ALPHA_K = {"alpha_k": 1, "kl": 2}
# Differences between logits: small against the logits, whose float32 rounding they inherit. In nats.
_LOGIT_DIFFERENCES = ("entropy_min", "kl")
_LOGIT_ROUNDING = 1e-4


def output_tolerances(
    expected: Sequence[Mapping[str, Array]],
    sws_spec: SwsSpec,
    precision: Precision,
) -> dict[str, float]:
    """The outputs to compare, each with its tolerance relative to its largest absolute value.

    Args:
        expected: Outputs of the reference at each step.
        sws_spec: The SWS configuration of the graph, and the format of its weights.
        precision: Precision of the export.
    """
    parameters = sws_spec.parameters
    sampled = 0.0 if sws_spec.guard.entropy_rows == 1 else _SAMPLED_ROWS
    quantized = quantized_tolerance(sws_spec)
    tolerances = {}
    for name in expected[0]:
        if name == "out_sample":
            budget = parameters.kl_floor + parameters.kl_slope
            at_budget = precision == "fp32" and budget < 1e-3
            rounding = _PREDICTION_AT_BUDGET if at_budget else _PREDICTION[precision]
            tolerances[name] = max(sampled, quantized, rounding)
        elif is_state(name):
            tolerances[name] = _STATE
        elif not sampled or name.removeprefix(PREFIX) not in _SET_BY_GUARD:
            tolerances[name] = max(sampled, quantized, _SITE_METRIC[precision])
    interval = parameters.key_cap / 2**parameters.bisection_steps
    for metric, power in _POWERS_OF_ALPHA_K.items():
        _add_absolute(tolerances, metric, power * interval, _largest(expected, "alpha_k"))
    for metric in _LOGIT_DIFFERENCES:
        _add_absolute(tolerances, metric, _LOGIT_ROUNDING, _largest(expected, metric))
    return tolerances


def quantized_tolerance(sws_spec: SwsSpec) -> float:
    """Largest difference of the prediction of a graph with 8-bit weights that passes; 0 without them."""
    if sws_spec.activations is not None:
        return _PREDICTION_ACTIVATIONS[sws_spec.activations]
    return _PREDICTION_WEIGHTS[sws_spec.weights] if sws_spec.weights else 0.0


def _add_absolute(tolerances: dict[str, float], metric: str, difference: float, largest: float) -> None:
    """Add an absolute tolerance to the relative one of a metric, if the metric is compared."""
    name = f"{PREFIX}{metric}"
    if name in tolerances:
        tolerances[name] += difference / largest


def _largest(expected: Sequence[Mapping[str, Array]], metric: str) -> float:
    """The smallest positive one of the largest values of a metric at each step; Inf if there is none."""
    name = f"{PREFIX}{metric}"
    largest = [float(np.max(outputs[name])) for outputs in expected if name in outputs]
    return min((value for value in largest if value > 0), default=float("inf"))

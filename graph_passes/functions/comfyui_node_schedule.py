"""`sws.ComfyUINodeSchedule`, `sws.ComfyUINodeCallSchedule`: what depends on u and the intensity only."""

import math
from typing import Any

import onnx_ir as ir

from graph_passes.functions.building import Op, define_function
from graph_passes.parameters import SwsParameters

FLOAT = ir.DataType.FLOAT
CALL_CYCLE = 64
"""Calls after which the published node's u starts over."""

_OUTPUTS = ["u", "tau", "amplitude", "kappa", "key_gate", "value_gain"]


def build_comfyui_node_schedule(parameters: SwsParameters) -> ir.Function:
    """`ComfyUINodeSchedule(sigma, intensity) -> u, tau, amplitude, kappa, key_gate, value_gain`.

    Inputs are [B], outputs [1], all float32: the values of the first sample are used for the whole batch. u
    is the remaining noise, 1 at `sigma_max`; tau the temperature of queries and keys together; amplitude
    `intensity * w(u)`, before the entropy factor; kappa the KL budget in nats; key_gate 0 from `u_stop` on,
    else 1; value_gain `value_cap * g(u)`.
    """
    log_min, log_max = math.log(parameters.sigma_min), math.log(parameters.sigma_max)

    def body(op: Op, sigma: Any, intensity: Any) -> tuple[Any, ...]:
        noise, strength = (op.Slice(batch, [0], [1], [0]) for batch in (sigma, intensity))
        u = op.Clip(op.Div(op.Sub(op.Log(noise), log_min), log_max - log_min), 0.0, 1.0)
        # Exactly 0 and 1 at the ends: with a rounded u, w would not be 0 there, and the state would change.
        u = op.Where(op.LessOrEqual(noise, parameters.sigma_min), 0.0, u)
        u = op.Where(op.GreaterOrEqual(noise, parameters.sigma_max), 1.0, u)
        return u, *_values(op, u, strength, parameters)

    return define_function("ComfyUINodeSchedule", body, {"sigma": FLOAT, "intensity": FLOAT}, _OUTPUTS)


def build_comfyui_node_call_schedule(parameters: SwsParameters, sites: int) -> ir.Function:
    """`ComfyUINodeCallSchedule(calls [1], intensity [B]) -> u, tau, …, value_gain [sites], calls_out [1]`.

    All float32. The outputs of `ComfyUINodeSchedule` for each site of the step, with u = (n mod 64) / 64 for
    the n-th call since the node was created, the first being 1: n = `calls` + site + 1. `calls_out` is the
    number of calls after the step, modulo 64. Exact for counts below 2^24.
    """

    def body(op: Op, calls: Any, intensity: Any) -> tuple[Any, ...]:
        strength = op.Slice(intensity, [0], [1], [0])
        count = op.Add(calls, [float(site + 1) for site in range(sites)])
        count = op.Sub(count, op.Mul(op.Floor(op.Div(count, float(CALL_CYCLE))), float(CALL_CYCLE)))
        u = op.Div(count, float(CALL_CYCLE))
        return u, *_values(op, u, strength, parameters), op.Slice(count, [sites - 1], [sites], [0])

    return define_function(
        "ComfyUINodeCallSchedule", body, {"calls": FLOAT, "intensity": FLOAT}, [*_OUTPUTS, "calls_out"]
    )


def _values(op: Op, u: Any, strength: Any, parameters: SwsParameters) -> tuple[Any, ...]:
    """All outputs but u, each with the shape of `u`."""
    rest = op.Sub(1.0, u)
    tau = op.Add(op.Mul(rest, parameters.theta), 1.0)
    amplitude = op.Mul(strength, op.Mul(op.Mul(u, rest), 4.0))
    kappa = op.Add(op.Mul(rest, parameters.kl_slope), parameters.kl_floor)
    key_gate = op.Cast(op.Less(u, parameters.u_stop), to=int(FLOAT))
    value_gain = op.Mul(op.Add(op.Mul(rest, 0.5), 0.5), parameters.value_cap)
    return tau, amplitude, kappa, key_gate, value_gain

"""`sws.ComfyUINodeSchedule`: all values that depend on the noise level and the intensity only."""

import math
from typing import Any

import onnx_ir as ir

from graph_passes.functions.building import Op, define_function
from graph_passes.parameters import SwsParameters

FLOAT = ir.DataType.FLOAT


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
        rest = op.Sub(1.0, u)
        tau = op.Add(op.Mul(rest, parameters.theta), 1.0)
        amplitude = op.Mul(strength, op.Mul(op.Mul(u, rest), 4.0))
        kappa = op.Add(op.Mul(rest, parameters.kl_slope), parameters.kl_floor)
        key_gate = op.Cast(op.Less(u, parameters.u_stop), to=int(FLOAT))
        value_gain = op.Mul(op.Add(op.Mul(rest, 0.5), 0.5), parameters.value_cap)
        return u, tau, amplitude, kappa, key_gate, value_gain

    return define_function(
        "ComfyUINodeSchedule",
        body,
        {"sigma": FLOAT, "intensity": FLOAT},
        ["u", "tau", "amplitude", "kappa", "key_gate", "value_gain"],
    )

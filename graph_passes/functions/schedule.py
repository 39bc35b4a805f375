"""`sws.Schedule`: all values that depend on the noise level and the intensity only."""

import math
from typing import Any

import onnx_ir as ir

from graph_passes.functions.building import Op, define_function
from graph_passes.parameters import SwsParameters

FLOAT = ir.DataType.FLOAT


def build_schedule(parameters: SwsParameters) -> ir.Function:
    """`Schedule(sigma, intensity) -> blend, tau_q, amplitude, kappa, key_gate, value_gain`.

    All float32. blend is [B, 3], the weights of the fine, middle and coarse transport; everything else is
    [B]. With u the progress of sampling, amplitude is `intensity * w(u)`, before the entropy factor; kappa is
    the KL budget in nats; key_gate is 0 from `u_stop` on, else 1; value_gain is `value_cap * g(u)`.
    """
    log_min, log_max = math.log(parameters.sigma_min), math.log(parameters.sigma_max)

    def body(op: Op, sigma: Any, intensity: Any) -> tuple[Any, ...]:
        progress = op.Div(op.Sub(log_max, op.Log(sigma)), log_max - log_min)
        u = op.Clip(progress, 0.0, 1.0)
        if parameters.schedule == "noise":
            u = op.Sub(1.0, u)
        rest = op.Sub(1.0, u)

        weights = [op.Mul(rest, 0.5), op.Mul(u, rest), u]
        stacked = op.Concat(*[op.Unsqueeze(weight, [1]) for weight in weights], axis=1)
        blend = op.Div(stacked, op.ReduceSum(stacked, [1], keepdims=1))

        tau_q = op.Add(op.Mul(op.Mul(intensity, rest), parameters.theta), 1.0)
        amplitude = op.Mul(intensity, op.Mul(op.Mul(u, rest), 4.0))
        kappa = op.Add(op.Mul(rest, parameters.kl_slope), parameters.kl_floor)
        key_gate = op.Cast(op.Less(u, parameters.u_stop), to=int(FLOAT))
        value_gain = op.Mul(op.Add(op.Mul(rest, 0.5), 0.5), parameters.value_cap)
        return blend, tau_q, amplitude, kappa, key_gate, value_gain

    return define_function(
        "Schedule",
        body,
        {"sigma": FLOAT, "intensity": FLOAT},
        ["blend", "tau_q", "amplitude", "kappa", "key_gate", "value_gain"],
    )

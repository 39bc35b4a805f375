"""The attn2 patch of the ComfyUI node: changes the inputs of one cross-attention before their projection.

There are no heads, and the scalars are shared across the batch. Attention weights, entropies and KL
divergences are computed in float32 (in float64 for a float64 model) for every dtype of the model.
"""

import dataclasses
import math

import torch
from torch import Tensor

from graph_passes.parameters import SwsParameters
from sws_export.reference.attention import entropy_factor
from sws_export.reference.comfyui_node_transport import moving_average
from sws_export.reference.orthonormal_basis import orthonormal_basis

CALL_CYCLE = 64
_LOG_FLOOR = 1e-8


@dataclasses.dataclass(frozen=True)
class ComfyUINodeSchedule:
    """Quantities of one step, each [1], float32 or float64.

    Attributes:
        u: Remaining noise: 1 at sigma_max, 0 at sigma_min; or a counter of calls, in [0, 1).
        tau: Temperature of the logits; queries and keys are each divided by its square root.
        w: Bell-shaped weight of the mixing amplitude.
        kappa: KL budget of the key mixing in nats.
        g: Factor of the value mixing, which rises from 0.5 to 1.
    """

    u: Tensor
    tau: Tensor
    w: Tensor
    kappa: Tensor
    g: Tensor


def comfyui_node_schedule(sigma: Tensor, parameters: SwsParameters) -> ComfyUINodeSchedule:
    """The schedule of a batch, computed from the noise level of its first sample.

    Args:
        sigma: Noise levels > 0, [B], any float dtype.
        parameters: Parameters of the method.
    """
    noise = sigma[:1].to(torch.promote_types(sigma.dtype, torch.float32))
    log_min, log_max = math.log(parameters.sigma_min), math.log(parameters.sigma_max)
    u = ((noise.log() - log_min) / (log_max - log_min)).clamp(0, 1)
    # Exactly 0 or 1 at the bounds: otherwise rounding could leave w > 0 there, which would count as mixing.
    u = torch.where(noise >= parameters.sigma_max, 1.0, torch.where(noise <= parameters.sigma_min, 0.0, u))
    return _schedule_of(u, parameters)


def comfyui_node_call_schedule(count: Tensor, parameters: SwsParameters) -> ComfyUINodeSchedule:
    """The schedule of one call of the node without a noise level: u is (count mod 64) / 64.

    Args:
        count: Number of calls since the node was created, this one included, [1], float32 or float64.
        parameters: Parameters of the method.
    """
    return _schedule_of(count.remainder(CALL_CYCLE) / CALL_CYCLE, parameters)


def _schedule_of(u: Tensor, parameters: SwsParameters) -> ComfyUINodeSchedule:
    return ComfyUINodeSchedule(
        u=u,
        tau=1 + parameters.theta * (1 - u),
        w=4 * u * (1 - u),
        kappa=parameters.kl_slope * (1 - u) + parameters.kl_floor,
        g=0.5 + 0.5 * (1 - u),
    )


@dataclasses.dataclass(frozen=True)
class ComfyUINodeResult:
    """Inputs of the projections, and the metrics of the patch; scalars are [1].

    Attributes:
        q: Queries, [B, T, C], in the dtype of the model.
        k: Keys, [B, n, X], in the dtype of the model.
        v: Values, [B, n, X], in the dtype of the model.
        transport: The new state, [n, n].
        alpha_k: Mixing share of the transported keys.
        a_v: Mixing share of the transported values.
        amplitude: Mixing amplitude a, from which both shares are computed.
        uncertainty: h in [0, 1]: position of the mean entropy between the minimum and the maximum.
        entropy: Entropy of the rows of the plain attention in nats, [B, T].
        kl: KL divergence at `alpha_k` in nats.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    transport: Tensor
    alpha_k: Tensor
    a_v: Tensor
    amplitude: Tensor
    uncertainty: Tensor
    entropy: Tensor
    kl: Tensor


def comfyui_node_patch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    previous: Tensor,
    fresh: Tensor,
    schedule: ComfyUINodeSchedule,
    intensity: Tensor,
    parameters: SwsParameters,
) -> ComfyUINodeResult:
    """Divide queries and keys by the temperature, and mix keys and values with the transported ones.

    Args:
        q: Normalized hidden states, [B, T, C], in the dtype of the model.
        k: Text embeddings, [B, n, X].
        v: Text embeddings, [B, n, X].
        previous: State of the previous call, [n, n], float32 or float64; zeros if there was none.
        fresh: Transport of this step without the moving average, [n, n].
        schedule: Schedule of this step.
        intensity: Strength in [0, 1], [1].
        parameters: Parameters of the method.
    """
    root = schedule.tau.sqrt()
    guard_q, guard_k = q.to(root.dtype) / root, k.to(root.dtype) / root
    q, k = guard_q.to(q.dtype), guard_k.to(k.dtype)
    plain = attention_weights(guard_q, guard_k)
    entropy = row_entropies(plain)
    # Over the whole batch.
    uncertainty = entropy_factor(entropy.reshape(1, -1))
    amplitude = (intensity.to(uncertainty.dtype) * uncertainty * schedule.w).clamp(0, 1)
    if amplitude == 0:
        zero = torch.zeros_like(amplitude)
        return ComfyUINodeResult(q, k, v, previous, zero, zero, zero, uncertainty, entropy, zero)

    transport = moving_average(previous, fresh, parameters)
    guard_kp = transported(transport, guard_k)
    limit = parameters.key_cap * amplitude
    alpha_k = largest_mixing(guard_q, guard_k, guard_kp, plain, limit, schedule.kappa, parameters)
    alpha_k = torch.where(schedule.u >= parameters.u_stop, 0.0, alpha_k)
    a_v = (parameters.value_cap * amplitude * schedule.g).clamp(0, 1)
    return ComfyUINodeResult(
        q=q,
        k=mixed(k, transported(transport, k), alpha_k),
        v=mixed(v, transported(transport, v), a_v),
        transport=transport,
        alpha_k=alpha_k,
        a_v=a_v,
        amplitude=amplitude,
        uncertainty=uncertainty,
        entropy=entropy,
        kl=kl_divergence(attention_weights(guard_q, mixed(guard_k, guard_kp, alpha_k)), plain),
    )


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) without heads.

    If the widths differ, the wider tensor is projected to the smaller width d with an orthonormal basis.

    Args:
        q: [B, T, C], float32 or float64.
        k: [B, n, X], dtype of `q`.

    Returns:
        [B, T, n].
    """
    if q.shape[-1] > k.shape[-1]:
        q = q @ orthonormal_basis(q.shape[-1], k.shape[-1]).to(q)
    elif k.shape[-1] > q.shape[-1]:
        k = k @ orthonormal_basis(k.shape[-1], q.shape[-1]).to(k)
    return (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(dim=-1)


def row_entropies(weights: Tensor) -> Tensor:
    """Entropy of each row in nats, [B, T], from attention weights [B, T, n]."""
    return -torch.xlogy(weights, weights).sum(dim=-1)


def transported(transport: Tensor, x: Tensor) -> Tensor:
    """Apply the transport [n, n] over the tokens of `x` [B, n, X]; returned in the dtype of `x`."""
    return (transport @ x.to(transport.dtype)).to(x.dtype)


def mixed(x: Tensor, xp: Tensor, share: Tensor) -> Tensor:
    """(1 - share) x + share xp, in a form that gives exactly x for share 0; `share` is [1]."""
    return x + share.to(x.dtype) * (xp - x)


def kl_divergence(weights: Tensor, plain: Tensor) -> Tensor:
    """KL( weights || plain ) in nats, mean over samples and rows: [1] from two tensors [B, T, n].

    Weights are clamped to at least 1e-8 in the logarithms.
    """
    ratio = weights.clamp(min=_LOG_FLOOR).log() - plain.clamp(min=_LOG_FLOOR).log()
    return (weights * ratio).sum(dim=-1).mean()[None]


def largest_mixing(
    q: Tensor,
    k: Tensor,
    kp: Tensor,
    plain: Tensor,
    limit: Tensor,
    kappa: Tensor,
    parameters: SwsParameters,
) -> Tensor:
    """The largest mixing share of the transported keys with a KL divergence within the budget.

    Bisection of [0, limit] with a fixed number of steps; the lower bound is returned.

    Args:
        q: [B, T, C], already divided by the square root of the temperature.
        k: [B, n, X], already divided by the square root of the temperature.
        kp: Transported keys, [B, n, X].
        plain: `attention_weights(q, k)`.
        limit: Upper bound of the share, [1].
        kappa: KL budget in nats, [1].
        parameters: Parameters of the method; `bisection_steps` is used.

    Returns:
        [1], in the dtype of `limit`.
    """
    low, high = torch.zeros_like(limit), limit
    for _ in range(parameters.bisection_steps):
        middle = (low + high) / 2
        within = kl_divergence(attention_weights(q, mixed(k, kp, middle)), plain) <= kappa
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return low

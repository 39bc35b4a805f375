"""What the node does to the inputs of one cross-attention, before they are projected.

It knows no heads, and its scalars are those of the whole batch. Attention weights, entropies and KL
divergences are in float32 (float64 for a float64 model), whatever the model's dtype.
"""

import dataclasses
import math

import torch
from torch import Tensor

from graph_passes.parameters import SwsParameters
from sws_export.reference.comfyui_node_transport import moving_average
from sws_export.reference.orthonormal_basis import orthonormal_basis

_LOG_FLOOR = 1e-8
_MIN_RANGE = 1e-6


@dataclasses.dataclass(frozen=True)
class ComfyUINodeSchedule:
    """Quantities of one step, each [1], float32 or float64.

    Attributes:
        u: Remaining noise: 1 at sigma_max, 0 at sigma_min.
        tau: Temperature of queries and keys together.
        w: Bell-shaped weight of the mixing amplitude.
        kappa: KL budget of the key mixing in nats.
        g: Rise of the value mixing, from 0.5 to 1.
    """

    u: Tensor
    tau: Tensor
    w: Tensor
    kappa: Tensor
    g: Tensor


def comfyui_node_schedule(sigma: Tensor, parameters: SwsParameters) -> ComfyUINodeSchedule:
    """The schedule of a batch, whose noise level is that of its first sample.

    Args:
        sigma: Noise levels > 0, [B], any float dtype.
        parameters: The constants of the method.
    """
    noise = sigma[:1].to(torch.promote_types(sigma.dtype, torch.float32))
    log_min, log_max = math.log(parameters.sigma_min), math.log(parameters.sigma_max)
    u = ((noise.log() - log_min) / (log_max - log_min)).clamp(0, 1)
    # At the ends exactly: what rounding leaves of w there would count as mixing.
    u = torch.where(noise >= parameters.sigma_max, 1.0, torch.where(noise <= parameters.sigma_min, 0.0, u))
    return ComfyUINodeSchedule(
        u=u,
        tau=1 + parameters.theta * (1 - u),
        w=4 * u * (1 - u),
        kappa=parameters.kl_slope * (1 - u) + parameters.kl_floor,
        g=0.5 + 0.5 * (1 - u),
    )


@dataclasses.dataclass(frozen=True)
class NodeResult:
    """What the node hands to the projections, and how it came to it; scalars are [1].

    Attributes:
        q: Queries, [B, T, C], the model's dtype.
        k: Keys, [B, n, X], the model's dtype.
        v: Values, as `k`.
        transport: What is kept for the next call, [n, n].
        alpha_k: Share of the transported keys.
        a_v: Share of the transported values.
        amplitude: The a from which both follow.
        uncertainty: h in [0, 1]: the place of the mean entropy between the lowest and the highest.
        entropy: Of the rows of the plain attention in nats, [B, T].
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


def node_patch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    previous: Tensor,
    fresh: Tensor,
    schedule: ComfyUINodeSchedule,
    intensity: Tensor,
    parameters: SwsParameters,
) -> NodeResult:
    """Queries, keys and values with the node's temperature, and tokens mixed.

    Args:
        q: Normalised hidden states, [B, T, C], the model's dtype.
        k: Text embeddings, [B, n, X].
        v: As `k`.
        previous: Transport that the call before kept, [n, n], float32 or float64; zeros for none.
        fresh: Transport of this step without its history, likewise.
        schedule: Of this step.
        intensity: Strength in [0, 1], [1].
        parameters: The constants of the method.
    """
    root = schedule.tau.sqrt()
    guard_q, guard_k = q.to(root.dtype) / root, k.to(root.dtype) / root
    q, k = guard_q.to(q.dtype), guard_k.to(k.dtype)
    plain = attention_weights(guard_q, guard_k)
    entropy = row_entropies(plain)
    uncertainty = entropy_factor(entropy)
    amplitude = (intensity.to(uncertainty.dtype) * uncertainty * schedule.w).clamp(0, 1)
    if amplitude == 0:
        zero = torch.zeros_like(amplitude)
        return NodeResult(q, k, v, previous, zero, zero, zero, uncertainty, entropy, zero)

    transport = moving_average(previous, fresh, parameters)
    guard_kp = transported(transport, guard_k)
    limit = parameters.key_cap * amplitude
    alpha_k = largest_mixing(guard_q, guard_k, guard_kp, plain, limit, schedule.kappa, parameters)
    alpha_k = torch.where(schedule.u >= parameters.u_stop, 0.0, alpha_k)
    a_v = (parameters.value_cap * amplitude * schedule.g).clamp(0, 1)
    return NodeResult(
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
    """softmax(q k' / sqrt(d)) without heads, over a common width d.

    Where the widths differ, the wider of the two is brought to the narrower one by an orthonormal basis.

    Args:
        q: [B, T, C], float32 or float64.
        k: [B, n, X], likewise.

    Returns:
        [B, T, n].
    """
    if q.shape[-1] > k.shape[-1]:
        q = q @ orthonormal_basis(q.shape[-1], k.shape[-1]).to(q)
    elif k.shape[-1] > q.shape[-1]:
        k = k @ orthonormal_basis(k.shape[-1], q.shape[-1]).to(k)
    return (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(dim=-1)


def row_entropies(weights: Tensor) -> Tensor:
    """Entropy of each row in nats: [B, T, n] to [B, T]."""
    return -torch.xlogy(weights, weights).sum(dim=-1)


def entropy_factor(entropy: Tensor) -> Tensor:
    """The mean of all rows of all samples between the lowest (0) and the highest (1): [B, T] to [1]."""
    low, high = entropy.min(), entropy.max()
    return ((entropy.mean() - low) / (high - low).clamp(min=_MIN_RANGE)).clamp(0, 1)[None]


def transported(transport: Tensor, x: Tensor) -> Tensor:
    """P x over the tokens: [n, n] and [B, n, X] to [B, n, X], in the dtype of `x`."""
    return (transport @ x.to(transport.dtype)).to(x.dtype)


def mixed(x: Tensor, xp: Tensor, share: Tensor) -> Tensor:
    """(1 - share) x + share xp, written so that share 0 gives x itself, exactly; `share` is [1]."""
    return x + share.to(x.dtype) * (xp - x)


def kl_divergence(weights: Tensor, plain: Tensor) -> Tensor:
    """KL( weights || plain ) in nats, mean over samples and rows: twice [B, T, n] to [1].

    Logarithms are of weights of 1e-8 at least.
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
    """The largest share of transported keys that keeps the KL divergence within its budget.

    Found by halving [0, limit] a fixed number of times; the lower end is returned.

    Args:
        q: [B, T, C], already divided by its temperature.
        k: [B, n, X], likewise.
        kp: Transported keys, as `k`.
        plain: `attention_weights(q, k)`.
        limit: Largest share to consider, [1].
        kappa: Budget in nats, [1].
        parameters: Gives the number of halvings.

    Returns:
        [1], in the dtype of `limit`.
    """
    low, high = torch.zeros_like(limit), limit
    for _ in range(parameters.bisection_steps):
        middle = (low + high) / 2
        within = kl_divergence(attention_weights(q, mixed(k, kp, middle)), plain) <= kappa
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return low

"""One attention site: keys and values are mixed with the transported keys and values, then attended to.

Softmax statistics, entropies, KL divergences and mixing amplitudes are computed in float32 (in float64 for a
float64 model); queries, keys, values and the final attention have the dtype of the model. T x L matrices are
computed for one sample and head at a time and recomputed for each use, so that 64 x 64 tokens take less than
1 GB.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from graph_passes.parameters import SwsParameters
from sws_export.reference.noise_schedule import Schedule

_MIN_RANGE = 1e-6
"""Smallest range of entropies (nats) that the entropy factor is relative to."""


@dataclasses.dataclass(frozen=True)
class SiteResult:
    """Result of one site. All attributes except `out` are [B], float32 or float64.

    Attributes:
        out: Attention output, [B, h, T, D], in the dtype of the model.
        alpha_k: Mixing share of the transported keys.
        a_v: Mixing share of the transported values.
        amplitude: Mixing amplitude a, from which both shares are computed.
        hu: Uncertainty in [0, 1]: position of the mean entropy between the minimum and the maximum.
        entropy_mean: Mean entropy of the rows of the plain attention, over heads and rows, in nats.
        entropy_min: Minimum entropy.
        entropy_max: Maximum entropy.
        kl: KL divergence at `alpha_k` in nats, mean over heads and rows.
    """

    out: Tensor
    alpha_k: Tensor
    a_v: Tensor
    amplitude: Tensor
    hu: Tensor
    entropy_mean: Tensor
    entropy_min: Tensor
    entropy_max: Tensor
    kl: Tensor


def attention_site(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    transport: Tensor,
    schedule: Schedule,
    intensity: Tensor,
    parameters: SwsParameters,
    kl_rows: Tensor | None = None,
) -> SiteResult:
    """Attention with mixed keys and values.

    Args:
        q: Projected queries, [B, h, T, D], in the dtype of the model.
        k: Projected keys, [B, h, L, D], of the image tokens (L = T) or of the text tokens.
        v: Projected values, [B, h, L, D].
        transport: Transport P over the tokens of the keys, [B, L, L], float32 or float64.
        schedule: Schedule of the samples.
        intensity: Strength in [0, 1], [B]; 0 gives the plain attention, bit for bit.
        parameters: Parameters of the method.
        kl_rows: Indices of the query rows whose mean KL divergence the budget limits; None for all.
    """
    q = (q / per_sample(schedule.tau_q)).to(q.dtype)
    kp, vp = transported(transport, k), transported(transport, v)

    entropy = row_entropies(q, k).flatten(1)
    mean, low, high = entropy.mean(dim=1), entropy.amin(dim=1), entropy.amax(dim=1)
    hu = entropy_factor(entropy)
    amplitude = (intensity.to(hu.dtype) * hu * schedule.w).clamp(0, 1)

    rows = q if kl_rows is None else q[:, :, kl_rows]
    alpha_k = largest_mixing(rows, k, kp, parameters.key_cap * amplitude, schedule.kappa, parameters)
    alpha_k = torch.where(schedule.u >= parameters.u_stop, 0.0, alpha_k)
    a_v = (parameters.value_cap * amplitude * schedule.g).clamp(0, 1)
    return SiteResult(
        out=F.scaled_dot_product_attention(q, mixed(k, kp, alpha_k), mixed(v, vp, a_v)),
        alpha_k=alpha_k,
        a_v=a_v,
        amplitude=amplitude,
        hu=hu,
        entropy_mean=mean,
        entropy_min=low,
        entropy_max=high,
        kl=kl_divergence(q, k, kp, alpha_k),
    )


def per_sample(values: Tensor) -> Tensor:
    """Reshape [B] to [B, 1, 1, 1], which broadcasts over [B, h, T, D]."""
    return values[:, None, None, None]


def transported(transport: Tensor, x: Tensor) -> Tensor:
    """Apply the transport over the tokens, P x, with the same P for all heads.

    Args:
        transport: [B, L, L], float32 or float64.
        x: [B, h, L, D], any float dtype.

    Returns:
        [B, h, L, D], computed in the dtype of `transport`, returned in the dtype of `x`.
    """
    by_token = x.transpose(1, 2)
    moved = transport @ by_token.flatten(2).to(transport.dtype)
    return moved.view(by_token.shape).transpose(1, 2).to(x.dtype)


def mixed(x: Tensor, xp: Tensor, share: Tensor) -> Tensor:
    """(1 - share) x + share xp, in a form that gives exactly x for share 0.

    Args:
        x: [B, h, L, D].
        xp: [B, h, L, D].
        share: [B].
    """
    return x + per_sample(share).to(x.dtype) * (xp - x)


def logits(q: Tensor, k: Tensor) -> Tensor:
    """Attention logits of one head, q k' / sqrt(D).

    Args:
        q: [T, D], any float dtype.
        k: [L, D], dtype of `q`.

    Returns:
        [T, L], float32 or float64.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.to(dtype) @ k.to(dtype).T / math.sqrt(q.shape[-1])


def row_entropies(q: Tensor, k: Tensor) -> Tensor:
    """Entropy of each row of softmax(q k' / sqrt(D)), in nats.

    Args:
        q: [B, h, T, D].
        k: [B, h, L, D].

    Returns:
        [B, h, T], float32 or float64.
    """
    rows = [_row_entropies_of_head(*head) for head in zip(q.flatten(0, 1), k.flatten(0, 1), strict=True)]
    return torch.stack(rows).view(q.shape[:3])


def _row_entropies_of_head(q: Tensor, k: Tensor) -> Tensor:
    log_a0 = logits(q, k).log_softmax(dim=-1)
    return -(log_a0.exp() * log_a0).sum(dim=-1)


def entropy_factor(entropy: Tensor) -> Tensor:
    """Position of the mean row entropy between the smallest (0) and the largest (1): [B] from [B, rows]."""
    low, high = entropy.amin(dim=1), entropy.amax(dim=1)
    return ((entropy.mean(dim=1) - low) / (high - low).clamp(min=_MIN_RANGE)).clamp(0, 1)


def kl_divergence(q: Tensor, k: Tensor, kp: Tensor, alpha: Tensor) -> Tensor:
    """KL( softmax(S0 + alpha Delta) || softmax(S0) ), mean over heads and rows, in nats.

    S0 are the logits with `k`, S0 + Delta those with `kp`.

    Args:
        q: [B, h, T, D], already divided by its temperature.
        k: [B, h, L, D].
        kp: Transported keys, [B, h, L, D].
        alpha: Mixing share of the transported keys, [B].

    Returns:
        [B], float32 or float64.
    """
    alpha_of_head = alpha.repeat_interleave(q.shape[1])
    heads = zip(q.flatten(0, 1), k.flatten(0, 1), kp.flatten(0, 1), alpha_of_head, strict=True)
    return torch.stack([_row_kl_of_head(*head) for head in heads]).view(len(q), -1).mean(dim=1)


def _row_kl_of_head(q: Tensor, k: Tensor, kp: Tensor, alpha: Tensor) -> Tensor:
    s0 = logits(q, k)
    delta = logits(q, kp) - s0
    log_a0 = s0.log_softmax(dim=-1)
    log_a = (s0 + alpha * delta).log_softmax(dim=-1)
    return (log_a.exp() * (log_a - log_a0)).sum(dim=-1)


def largest_mixing(
    q: Tensor, k: Tensor, kp: Tensor, limit: Tensor, kappa: Tensor, parameters: SwsParameters
) -> Tensor:
    """The largest mixing share of the transported keys with a KL divergence within the budget.

    Bisection of [0, limit] with a fixed number of steps. The lower bound is returned, so the result is
    limit * (1 - 2 ** -bisection_steps) if the budget is never exceeded.

    Args:
        q: [B, h, T, D], already divided by the temperature.
        k: [B, h, L, D].
        kp: Transported keys, [B, h, L, D].
        limit: Upper bound of the share, [B].
        kappa: KL budget in nats, [B].
        parameters: Parameters of the method; `bisection_steps` is used.

    Returns:
        [B], in the dtype of `limit`.
    """
    low, high = torch.zeros_like(limit), limit
    for _ in range(parameters.bisection_steps):
        middle = (low + high) / 2
        within = kl_divergence(q, k, kp, middle) <= kappa
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return low

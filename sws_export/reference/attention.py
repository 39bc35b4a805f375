"""One self-attention site: how far keys and values are mixed with their transported selves, and the result.

Softmax statistics, entropies, KL divergences and mixing amplitudes are in float32 (float64 for a float64
model); queries, keys, values and the final attention are in the model's dtype. T x T matrices are made for
one sample and head at a time, and anew for each use: 64 x 64 tokens stay below a gigabyte.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from graph_passes.parameters import SwsParameters
from sws_export.reference.noise_schedule import Schedule


@dataclasses.dataclass(frozen=True)
class SiteResult:
    """What one site computed; all but `out` is [B], float32 or float64.

    Attributes:
        out: Attention output, [B, h, T, D], in the model's dtype.
        alpha_k: Share of the transported keys.
        a_v: Share of the transported values.
        amplitude: The a from which both follow.
        hu: Uncertainty in [0, 1]: the place of the mean entropy between the lowest and the highest.
        entropy_mean: Of the rows of the plain attention, over heads and rows, in nats.
        entropy_min: The lowest of them.
        entropy_max: The highest of them.
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
) -> SiteResult:
    """Attention with shuffled keys and values.

    Args:
        q: Queries after their projection, [B, h, T, D], the model's dtype.
        k: Keys, [B, h, L, D]: of the tokens of the queries, or of the text.
        v: Values, as `k`.
        transport: P, [B, L, L], float32 or float64, over the tokens of the keys.
        schedule: Of the same samples.
        intensity: Strengths in [0, 1], [B]; 0 gives plain attention, bit for bit.
        parameters: The constants of the method.
    """
    q = (q / per_sample(schedule.tau_q)).to(q.dtype)
    kp, vp = transported(transport, k), transported(transport, v)

    entropy = row_entropies(q, k).flatten(1)
    mean, low, high = entropy.mean(dim=1), entropy.amin(dim=1), entropy.amax(dim=1)
    hu = ((mean - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    amplitude = (intensity.to(hu.dtype) * hu * schedule.w).clamp(0, 1)

    alpha_k = largest_mixing(q, k, kp, parameters.key_cap * amplitude, schedule.kappa, parameters)
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
    """[B] made to spread over [B, h, T, D]."""
    return values[:, None, None, None]


def transported(transport: Tensor, x: Tensor) -> Tensor:
    """P x over the tokens, the same P for every head.

    Args:
        transport: [B, T, T], float32 or float64.
        x: [B, h, T, D], any float dtype.

    Returns:
        [B, h, T, D], computed in the dtype of `transport`, returned in that of `x`.
    """
    by_token = x.transpose(1, 2)
    moved = transport @ by_token.flatten(2).to(transport.dtype)
    return moved.view(by_token.shape).transpose(1, 2).to(x.dtype)


def mixed(x: Tensor, xp: Tensor, share: Tensor) -> Tensor:
    """(1 - share) x + share xp, written so that share 0 gives x itself, exactly.

    Args:
        x: [B, h, T, D].
        xp: As `x`.
        share: [B].
    """
    return x + per_sample(share).to(x.dtype) * (xp - x)


def logits(q: Tensor, k: Tensor) -> Tensor:
    """Attention logits of one head, q k' / sqrt(D).

    Args:
        q: [T, D], any float dtype.
        k: [L, D], as `q`.

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


def kl_divergence(q: Tensor, k: Tensor, kp: Tensor, alpha: Tensor) -> Tensor:
    """KL( softmax(S0 + alpha Delta) || softmax(S0) ), mean over heads and rows, in nats.

    S0 are the logits with `k`, S0 + Delta those with `kp`.

    Args:
        q: [B, h, T, D], already divided by its temperature.
        k: [B, h, L, D].
        kp: Transported keys, as `k`.
        alpha: Share of the transported keys, [B].

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
    """The largest share of transported keys that keeps the KL divergence within its budget.

    Found by halving [0, limit] a fixed number of times; the lower end is returned, so a budget that never
    binds gives limit * (1 - 2 ** -bisection_steps).

    Args:
        q: [B, h, T, D], already divided by its temperature.
        k: [B, h, L, D].
        kp: Transported keys, as `k`.
        limit: Largest share to consider, [B].
        kappa: Budget in nats, [B].
        parameters: Gives the number of halvings.

    Returns:
        [B], in the dtype of `limit`.
    """
    low, high = torch.zeros_like(limit), limit
    for _ in range(parameters.bisection_steps):
        middle = (low + high) / 2
        within = kl_divergence(q, k, kp, middle) <= kappa
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return low

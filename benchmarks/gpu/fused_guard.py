"""The key guard of the GPU lowering in torch: four fused 16-bit attentions beside the site's own.

KL(t) = t K'(t) - integral of K' from 0 to t, and K'(s) = E_s[Delta] is the mean of q times the output of an
attention over the keys k + s d with the values d = k_perm - k. Its values at s = 0, L/2 and L, L the largest
grid point, give a quadratic K' and so KL at every grid point. The log-sum-exp for the entropies is read from
one more key whose logit is known. All attentions have values as wide as their keys, so a fused kernel exists.

Used to check the cost model of the engines: TensorRT and ONNX Runtime run the same chain of operations.
"""

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.references import SearchInputs, site_amplitude, split_heads

ATTENTIONS = 4
_MARK_CHANNELS = 8  # of the value that marks the extra key; head sizes stay multiples of 8


def fused_guard(
    q: torch.Tensor,
    k: torch.Tensor,
    k_perm: torch.Tensor,
    scalars: SearchInputs,
    heads: int,
    *,
    key_cap: float = 0.3,
    bisection_steps: int = 7,
) -> list[torch.Tensor]:
    """alpha_k and a_v, [B] float32, of q, k and k_perm [B, T, h * D] float16 or bfloat16.

    `scalars` are tau_q, amplitude, kappa, key_gate and value_gain, each [B] float32.
    """
    tau_q, amplitude, kappa, key_gate, value_gain = scalars
    keys, moved = split_heads(k, heads), split_heads(k_perm, heads)
    scale = 1 / (math.sqrt(keys.shape[-1]) * tau_q.view(-1, 1, 1, 1))
    # The scale goes into q, as in the engines.
    queries = (split_heads(q, heads).float() * scale).to(q.dtype)
    change = moved - keys
    entropy, slope_zero = _entropy_and_slope(queries, keys, change)
    a = site_amplitude(entropy, amplitude)
    points = 2**bisection_steps
    limit = key_cap * a * (points - 1) / points
    slopes = [slope_zero] + [_slope(queries, keys, change, limit * part) for part in (0.5, 1.0)]
    alpha = torch.arange(1, points, device=q.device) / points * (key_cap * a).unsqueeze(1)
    kl = _kl(slopes, alpha / limit.clamp_min(1e-12).unsqueeze(1), limit)
    steps = (kl <= kappa.unsqueeze(1)).sum(1)
    return [key_gate * key_cap * a * steps / points, (value_gain * a).clamp(0, 1)]


def _entropy_and_slope(
    queries: torch.Tensor, keys: torch.Tensor, change: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropies [B, h * T] of the rows of softmax(q k^T), and K'(0) [B]."""
    tokens = keys.shape[2]
    center = keys.float().mean(2, keepdim=True)
    # 1. E_0[S] of each row.
    spread = keys.float() - center
    deviation = scaled_dot_product_attention(queries, keys, spread.to(keys.dtype), scale=1.0)
    mean_logit = _dot(queries, center)
    expected = _dot(queries, deviation) + mean_logit
    # 2. The log-sum-exp, from a key whose logit is an estimate of it; its mark is -1, that of the others 1.
    covariance = spread.transpose(2, 3) @ spread / tokens
    variance = ((queries.float() @ covariance) * queries.float()).sum(-1)
    estimate = mean_logit + math.log(tokens) + variance / 2
    known = estimate.clamp(min=expected, max=expected + math.log(tokens)).to(queries.dtype)
    wide_queries = torch.cat([queries, known.unsqueeze(-1), _zeros(queries, _MARK_CHANNELS - 1)], -1)
    wide_keys = torch.cat([keys, _zeros(keys, _MARK_CHANNELS)], -1)
    extra_key = torch.zeros_like(wide_keys[:, :, :1])
    extra_key[..., keys.shape[-1]] = 1
    values = torch.cat([change, torch.ones_like(change[..., :1]), _zeros(change, _MARK_CHANNELS - 1)], -1)
    extra_value = torch.zeros_like(extra_key)
    extra_value[..., keys.shape[-1]] = -1
    out = scaled_dot_product_attention(
        wide_queries, torch.cat([wide_keys, extra_key], 2), torch.cat([values, extra_value], 2), scale=1.0
    ).float()
    size = keys.shape[-1]
    # Near the estimate the mark is near 0, where 16 bits keep its relative precision.
    mark = out[..., size].clamp(-0.9999, 0.9999)
    log_sum_exp = known.float() + 2 * torch.atanh(mark)
    share = (1 + mark) / 2  # of the real keys
    mean_delta = _dot(queries, out[..., :size]) / share
    return (log_sum_exp - expected).flatten(1), mean_delta.flatten(1).mean(1)


def _slope(queries: torch.Tensor, keys: torch.Tensor, change: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """K'(at) [B]. The values are the changes that the rounded keys have, so rounding is of second order."""
    at = at.view(-1, 1, 1, 1)
    mixed = (keys.float() + at * change.float()).to(keys.dtype)
    rounded = mixed - keys
    out = scaled_dot_product_attention(queries, mixed, rounded, scale=1.0)
    return _dot(queries, out).flatten(1).mean(1) / at.view(-1).clamp_min(1e-12)


def _kl(slopes: list[torch.Tensor], x: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """KL [B, points] at alpha = x limit, from K' at 0, limit / 2 and limit."""
    zero, middle, last = slopes
    c2 = (2 * (last - 2 * middle + zero)).unsqueeze(1)
    c1 = (last - zero).unsqueeze(1) - c2
    return limit.unsqueeze(1) * (c1 * x**2 / 2 + 2 * c2 * x**3 / 3)


def _dot(queries: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (queries.float() * values.float()).sum(-1)


def _zeros(like: torch.Tensor, channels: int) -> torch.Tensor:
    return torch.zeros_like(like[..., :1]).expand(*like.shape[:-1], channels)

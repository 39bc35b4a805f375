"""One self-attention with SWS in torch, from `scaled_dot_product_attention` alone.

No logits are materialized. The entropies and the KL divergence of the key guard come from outputs of
attentions (docs/method.md, "SWS in a live model"):

* with the keys as values, the mean logit E_0[S] of each row;
* with one more key of a known logit c and a channel that marks it, the log-sum-exp of each row, and with it
  the entropy; the other channels hold the change d of the keys, which gives the slope K'(0) = E_0[Delta];
* with the keys k + s d and the values d, the slope K'(s) = E_s[Delta]; with the marks, the log-sum-exp too.

KL(t) = t K'(t) - integral of K' from 0 to t, which is the change of the log-sum-exp. K' is interpolated by a
polynomial over a few nodes for an estimate; single steps are computed with the log-sum-exp.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from graph_passes.parameters import SwsParameters
from sws_export.reference import Schedule, entropy_factor

_SMALLEST_SHARE = 1e-6
_LARGEST_MARK = 1 - 2.0**-22
# Head sizes that fused kernels on GPUs support are multiples of this.
_HEAD_MULTIPLE = 8
# The guard first evaluates every n-th query row of a large site. If the KL divergence there is not well below
# the budget, it evaluates all rows, at few steps.
_ROW_STRIDE = 7
_LARGE = 512
_CLEARLY_WITHIN = 0.7
# Bound of the error of the estimate from some rows, for each step of distance: this fraction of the
# difference between two steps.
_UNSURE = 0.1
_TINY = 1e-30


class Transports(Protocol):
    """Applies the transport of each sample of a batch."""

    def apply(self, x: Tensor) -> Tensor:
        """P x over the tokens of x [B, T, C]."""


@dataclasses.dataclass(frozen=True)
class Levels:
    """What depends on the noise level and the intensity of each sample, [B] float32.

    Attributes:
        tau_q: Temperature of the queries.
        amplitude: `intensity * w(u)`, before the entropy factor.
        kappa: KL budget in nats.
        key_gate: 0 from `u_stop` on, else 1.
        value_gain: `value_cap * g(u)`.
        mixes: Whether any amplitude is above 0.
        mixes_keys: Whether any sample mixes keys.
    """

    tau_q: Tensor
    amplitude: Tensor
    kappa: Tensor
    key_gate: Tensor
    value_gain: Tensor
    mixes: bool
    mixes_keys: bool

    @classmethod
    def of(
        cls, schedule: Schedule, intensity: float, device: torch.device, parameters: SwsParameters
    ) -> "Levels":
        """From the schedule of the samples, which is on the CPU."""
        amplitude = intensity * schedule.w
        gate = (schedule.u < parameters.u_stop).float()
        return cls(
            tau_q=schedule.tau_q.float().to(device),
            amplitude=amplitude.float().to(device),
            kappa=schedule.kappa.float().to(device),
            key_gate=gate.to(device),
            value_gain=(parameters.value_cap * schedule.g).float().to(device),
            mixes=bool((amplitude > 0).any()),
            mixes_keys=bool((amplitude * gate > 0).any()),
        )


def shuffled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    transports: Transports,
    levels: Levels,
    parameters: SwsParameters,
) -> Tensor:
    """Self-attention with mixed keys and values.

    Args:
        q: Projected queries, [B, T, C], in the dtype of the model.
        k: Projected keys.
        v: Projected values.
        heads: Number of heads.
        transports: Those of the site's grid.
        levels: Those of the samples.
        parameters: Constants of the method.

    Returns:
        [B, T, C], in the dtype of the model.
    """
    q = (q / levels.tau_q[:, None, None]).to(q.dtype)
    if not levels.mixes:
        return plain_attention(q, k, v, heads)
    kp, vp = transports.apply(torch.cat([k, v], dim=2)).chunk(2, dim=2)
    rows = _Rows(_split(q, heads), _split(k, heads), _split(kp, heads))
    amplitude = (levels.amplitude * rows.entropy_factor()).clamp(0, 1)
    if levels.mixes_keys:
        limit = parameters.key_cap * amplitude
        share = levels.key_gate * limit * rows.steps(limit, levels.kappa, parameters.bisection_steps)
        k = _mixed(k, kp, share)
    v = _mixed(v, vp, (amplitude * levels.value_gain).clamp(0, 1))
    return plain_attention(q, k, v, heads)


class _Rows:
    """Statistics of the query rows of a site.

    Args are [B, h, T, D]: queries divided by their temperature, keys, and transported keys.
    """

    def __init__(self, q: Tensor, k: Tensor, kp: Tensor) -> None:
        if q.device.type != "cuda":
            # Attention in 16 bits is fast on GPUs only, and rounds the mixing shares.
            q, k, kp = q.float(), k.float(), kp.float()
        self.dtype = q.dtype
        # The scale of the logits is in the queries. A shift of all keys shifts all logits of a row alike.
        self.q = (q / math.sqrt(q.shape[-1])).to(self.dtype)
        self.k = k - k.mean(dim=2, keepdim=True)
        self.d = kp - k
        self.log_sum, self.mean = self._plain_rows()

    def _plain_rows(self) -> tuple[Tensor, Tensor]:
        """The log-sum-exp and the mean of the logits of each row, [B, h, T] float32; sets `slope`."""
        tokens = self.k.shape[2]
        q, k = self.q.float(), self.k.float()
        mean = (q * self._attention(self.q, self.k, self.k).float()).sum(dim=-1)
        covariance = k.transpose(2, 3) @ k / tokens
        spread = ((q @ covariance) * q).sum(dim=-1)
        centre = math.log(tokens) + spread / 2
        # The log-sum-exp lies between the mean logit and that plus log T; the nearer c, the more precise.
        centre = torch.minimum(torch.maximum(centre, mean), mean + math.log(tokens))
        log_sum, self.slope = self._log_sum_and_slope(self.k, self.d, centre)
        return log_sum, mean

    def entropy_factor(self) -> Tensor:
        """hu [B]: the position of the mean entropy between the smallest and the largest, over all rows."""
        return entropy_factor((self.log_sum - self.mean).flatten(1))

    def steps(self, limit: Tensor, kappa: Tensor, bisections: int) -> Tensor:
        """Share of `limit` [B] that keeps the KL divergence within `kappa` [B], in steps of 2^-bisections."""
        count: int = 2**bisections
        stride = _ROW_STRIDE if self.q.shape[2] > _LARGE else 1
        slopes = {0.0: self.slope[:, :, ::stride].flatten(1).mean(dim=1)}
        slopes |= {place: self._mean_slope(limit * place, stride) for place in (0.5, 1.0)}
        divergence = limit[:, None] * _divergence_of(slopes, count)
        if bool((divergence[:, -1] <= _CLEARLY_WITHIN * kappa).all()):
            return (divergence <= kappa[:, None]).sum(dim=1) / count
        slopes |= {place: self._mean_slope(limit * place, stride) for place in (0.25, 0.75)}
        return self._locate(limit[:, None] * _divergence_of(slopes, count), limit, kappa) / count

    def _locate(self, estimate: Tensor, limit: Tensor, kappa: Tensor) -> Tensor:
        """The largest step [B] whose KL divergence is within `kappa`, from an estimate for each step.

        The divergence of single steps is computed with all rows until one is allowed and the next is not. The
        estimate is scaled to the last of them; its error then grows with the distance from that step.
        """
        count = estimate.shape[1] + 1
        estimate = F.pad(estimate, (1, 0))
        allowed, rejected = torch.zeros_like(kappa, dtype=torch.long), torch.full_like(kappa, count).long()
        scaled, computed = estimate, None
        while True:
            step = (scaled <= kappa[:, None]).sum(dim=1) - 1
            step = torch.minimum(torch.maximum(step, allowed), rejected - 1)
            pair = torch.stack([step, step + 1], dim=1)
            gap = (scaled.gather(1, pair.clamp(max=count - 1)) - kappa[:, None]).abs()
            open_ = (pair > allowed[:, None]) & (pair < rejected[:, None])
            if computed is not None:
                upper = step[:, None].clamp(min=1)
                spacing = scaled.gather(1, upper) - scaled.gather(1, upper - 1)
                open_ &= gap <= _UNSURE * spacing * (pair - computed[:, None]).abs()
            if not bool(open_.any()):
                return step
            nearer = torch.where(open_, gap, math.inf).argmin(dim=1, keepdim=True)
            computed = pair.gather(1, nearer)[:, 0].clamp(1, count - 1)
            exact = self._divergence(limit * computed / count)
            within = exact <= kappa
            allowed = torch.where(within, torch.maximum(allowed, computed), allowed)
            rejected = torch.where(within, rejected, torch.minimum(rejected, computed))
            at = estimate.gather(1, computed[:, None])[:, 0]
            scaled = estimate * (exact / at.clamp(min=_TINY))[:, None]

    def _divergence(self, share: Tensor) -> Tensor:
        """KL divergence at `share` [B], the mean over heads and all query rows."""
        wide = share[:, None, None]
        # To first order; the second one is what is computed.
        log_sum, slope = self._log_sum_and_slope(*self._moved(share), self.log_sum + wide * self.slope)
        return (wide * slope - (log_sum - self.log_sum)).flatten(1).mean(dim=1)

    def _mean_slope(self, share: Tensor, stride: int) -> Tensor:
        """K'(share) [B], the mean over heads and every `stride`-th query row."""
        q = self.q[:, :, ::stride]
        out = self._attention(q, *self._moved(share)).float()
        return (q.float() * out).sum(dim=-1).flatten(1).mean(dim=1)

    def _moved(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """The keys at `share` [B], and their change for a share of 1."""
        share = share[:, None, None, None]
        keys = (self.k.float() + share * self.d.float()).to(self.dtype)
        if self.dtype == torch.float32:
            return keys, self.d
        # In 16 bits, the change as it was rounded: rounding then cancels to first order.
        return keys, ((keys.float() - self.k.float()) / share.clamp(min=_SMALLEST_SHARE)).to(self.dtype)

    def _log_sum_and_slope(self, keys: Tensor, change: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """The log-sum-exp of the logits of `keys`, and the mean of the logits of `change`, [B, h, T] float32.

        Args:
            keys: [B, h, T, D].
            change: [B, h, T, D].
            centre: A number near the log-sum-exp of each row, [B, h, T].
        """
        tokens, size = keys.shape[2:]
        centre = centre.to(self.dtype)
        extra = 1 if self.q.device.type == "cpu" else _HEAD_MULTIPLE
        wide_q = F.pad(self.q, (0, extra))
        wide_q[..., size] = centre
        wide_k, values = F.pad(keys, (0, extra, 0, 1)), F.pad(change, (0, extra, 0, 1))
        wide_k[:, :, tokens, size] = 1
        values[..., size] = -1
        values[:, :, tokens, size] = 1
        out = self._attention(wide_q, wide_k, values).float()
        mark = out[..., size].clamp(-_LARGEST_MARK, _LARGEST_MARK)
        slope = (self.q.float() * out[..., :size]).sum(dim=-1) * 2 / (1 - mark)
        return centre.float() - 2 * torch.atanh(mark), slope

    @staticmethod
    def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def _divergence_of(slopes: Mapping[float, Tensor], count: int) -> Tensor:
    """KL(x) at x = 1/count … (count - 1)/count, [B, count - 1], from K' [B] at some x, by interpolation."""
    places = sorted(slopes)
    values = torch.stack([slopes[place] for place in places], dim=1)
    inverse = torch.from_numpy(np.linalg.inv(np.vander(places, increasing=True))).to(values)
    coefficients = values @ inverse.T
    power = torch.arange(1, len(places), device=values.device, dtype=torch.float32)
    x = torch.arange(1, count, device=values.device, dtype=torch.float32)[:, None] / count
    # x K'(x) minus the integral of K', term by term.
    terms = x ** (power + 1) * power / (power + 1)
    return coefficients[:, 1:] @ terms.T


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention without SWS of q [B, T, C] to k and v [B, L, C]; returns [B, T, C]."""
    out = F.scaled_dot_product_attention(_split(q, heads), _split(k, heads), _split(v, heads))
    return out.transpose(1, 2).flatten(2)


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, T, C] as [B, heads, T, D]."""
    batch, tokens, channels = x.shape
    return x.view(batch, tokens, heads, channels // heads).transpose(1, 2)


def _mixed(x: Tensor, moved: Tensor, share: Tensor) -> Tensor:
    """x + share (moved - x) for x [B, T, C], share [B]; share 0 gives exactly x."""
    return x + share[:, None, None].to(x.dtype) * (moved - x)

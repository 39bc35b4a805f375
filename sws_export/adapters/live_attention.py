"""One self-attention with SWS in torch, from `scaled_dot_product_attention` alone.

No logits are stored. The entropies and the KL divergence of the key guard come from outputs of attentions
(docs/method.md, "SWS in a live model"):

* with the keys as values, the mean logit E_0[S] of each row;
* with one more key of a known logit c and a channel that marks it, the log-sum-exp of each row, and with it
  the entropy; the other channels hold the change d of the keys, which gives the slope K'(0) = E_0[Delta];
* with the keys k + s d and the values d, the slope K'(s) = E_s[Delta].

KL(t) = t K'(t) - integral of K' from 0 to t. K' is interpolated by a polynomial over a few nodes.
"""

import dataclasses
import math
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from graph_passes.parameters import SwsParameters
from sws_export.reference import Schedule

_MIN_RANGE = 1e-6
_LARGEST_MARK = 1 - 2.0**-22
# Head sizes that fused kernels on GPUs support are multiples of this.
_HEAD_MULTIPLE = 8
# The guard first looks at every n-th query row of a large site. If the KL divergence there is not well below
# the budget, it looks at all rows.
_ROW_STRIDE = 7
_LARGE = 512
_CLEARLY_WITHIN = 0.7
_COARSE_NODES, _FINE_NODES = 3, 5


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
        self.slope_rows: Tensor | None = None

    def entropy_factor(self) -> Tensor:
        """hu [B]: the position of the mean entropy between the smallest and the largest, over all rows."""
        tokens, size = self.k.shape[2:]
        q, k = self.q.float(), self.k.float()
        mean = (q * self._attention(self.q, self.k, self.k).float()).sum(dim=-1)
        covariance = k.transpose(2, 3) @ k / tokens
        spread = ((q @ covariance) * q).sum(dim=-1)
        centre = math.log(tokens) + spread / 2
        # The log-sum-exp lies between the mean logit and that plus log T; the nearer c, the more precise.
        centre = torch.minimum(torch.maximum(centre, mean), mean + math.log(tokens)).to(self.dtype)

        extra = 1 if self.q.device.type == "cpu" else _HEAD_MULTIPLE
        wide_q = F.pad(self.q, (0, extra))
        wide_q[..., size] = centre
        wide_k, values = F.pad(self.k, (0, extra, 0, 1)), F.pad(self.d, (0, extra, 0, 1))
        wide_k[:, :, tokens, size] = 1
        values[..., size] = -1
        values[:, :, tokens, size] = 1
        out = self._attention(wide_q, wide_k, values).float()
        mark = out[..., size].clamp(-_LARGEST_MARK, _LARGEST_MARK)
        log_sum = centre.float() - 2 * torch.atanh(mark)
        self.slope_rows = (q * out[..., :size]).sum(dim=-1) * 2 / (1 - mark)

        entropy = (log_sum - mean).flatten(1)
        low, high = entropy.amin(dim=1), entropy.amax(dim=1)
        return ((entropy.mean(dim=1) - low) / (high - low).clamp(min=_MIN_RANGE)).clamp(0, 1)

    def steps(self, limit: Tensor, kappa: Tensor, bisections: int) -> Tensor:
        """Share of `limit` [B] that keeps the KL divergence within `kappa` [B], in steps of 2^-bisections."""
        stride = _ROW_STRIDE if self.q.shape[2] > _LARGE else 1
        found, divergence = self._search(limit, kappa, bisections, _COARSE_NODES, stride)
        # All but the clear cases are computed again with all rows.
        if bool((divergence <= _CLEARLY_WITHIN * kappa).all()):
            return found
        found, _ = self._search(limit, kappa, bisections, _FINE_NODES, 1)
        return found

    def _search(
        self, limit: Tensor, kappa: Tensor, bisections: int, nodes: int, stride: int
    ) -> tuple[Tensor, Tensor]:
        """The share, and the KL divergence at the largest step."""
        assert self.slope_rows is not None
        places = np.linspace(0.0, 1.0, nodes)
        slopes = [self.slope_rows[:, :, ::stride].flatten(1).mean(dim=1)]
        slopes += [self._slope(limit * float(place), stride) for place in places[1:]]
        inverse = torch.from_numpy(np.linalg.inv(np.vander(places, increasing=True))).to(slopes[0])
        coefficients = torch.stack(slopes, dim=1) @ inverse.T
        count = 2**bisections
        power = torch.arange(1, nodes, device=limit.device, dtype=torch.float32)
        x = torch.arange(1, count, device=limit.device, dtype=torch.float32)[:, None] / count
        # x K'(x) minus the integral of K', term by term.
        terms = x ** (power + 1) * power / (power + 1)
        divergence = limit[:, None] * (coefficients[:, 1:] @ terms.T)
        return (divergence <= kappa[:, None]).sum(dim=1) / count, divergence[:, -1]

    def _slope(self, share: Tensor, stride: int) -> Tensor:
        """K'(share) [B], the mean over heads and query rows."""
        share = share[:, None, None, None]
        q = self.q[:, :, ::stride]
        keys = (self.k.float() + share * self.d.float()).to(self.dtype)
        # In 16 bits, the change as it was rounded: rounding then cancels to first order.
        values = self.d
        if self.dtype != torch.float32:
            values = ((keys.float() - self.k.float()) / share.clamp(min=_MIN_RANGE)).to(self.dtype)
        out = self._attention(q, keys, values).float()
        return (q.float() * out).sum(dim=-1).flatten(1).mean(dim=1)

    @staticmethod
    def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)


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

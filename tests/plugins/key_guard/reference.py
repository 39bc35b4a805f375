"""The key guard, written out literally in float64: materialized logits, seven softmaxes."""

import dataclasses
import math

import torch


@dataclasses.dataclass
class GuardCase:
    """Inputs of one guard call; tensors [B, T, h * D], scalars [B]."""

    q: torch.Tensor
    k: torch.Tensor
    kp: torch.Tensor
    heads: int
    amplitude: torch.Tensor
    kappa: torch.Tensor
    tau_q: torch.Tensor
    key_gate: torch.Tensor
    value_gain: torch.Tensor
    key_cap: float = 0.3
    bisection_steps: int = 7

    @property
    def scale(self) -> float:
        """1 / sqrt(D)."""
        return 1 / math.sqrt(self.q.shape[2] // self.heads)


@dataclasses.dataclass
class Logits:
    """S0 and S0 + Delta of one sample, [h, T, T]."""

    base: torch.Tensor
    moved: torch.Tensor

    def log_attention(self, alpha: float) -> torch.Tensor:
        """log softmax(S0 + alpha Delta)."""
        return torch.log_softmax(self.base + alpha * (self.moved - self.base), -1)

    def kl(self, alpha: float) -> float:
        """Mean over heads and rows of KL(softmax(S0 + alpha Delta) || softmax(S0))."""
        after, before = self.log_attention(alpha), self.log_attention(0.0)
        return float((after.exp() * (after - before)).sum(-1).mean())

    def entropies(self) -> torch.Tensor:
        """Entropy of each row of softmax(S0), [h, T]."""
        log_a0 = self.log_attention(0.0)
        return -(log_a0.exp() * log_a0).nan_to_num().sum(-1)


def logits_of(case: GuardCase, sample: int) -> Logits:
    """Materialized logits of one sample, in float64."""

    def heads_of(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[sample].double().unflatten(-1, (case.heads, -1)).transpose(0, 1)

    q = heads_of(case.q) / case.tau_q[sample].double()
    return Logits(
        q @ heads_of(case.k).transpose(1, 2) * case.scale, q @ heads_of(case.kp).transpose(1, 2) * case.scale
    )


def amplitude_of(case: GuardCase, sample: int, logits: Logits) -> float:
    """a = clamp(amplitude * hu)."""
    entropies = logits.entropies()
    low, high = entropies.min(), entropies.max()
    hu = ((entropies.mean() - low) / max(float(high - low), 1e-6)).clamp(0, 1)
    return float((case.amplitude[sample].double() * hu).clamp(0, 1))


def bisection_step(case: GuardCase, sample: int) -> int:
    """Grid point n that the literal bisection lands on: alpha = cap * n / 2^steps."""
    logits = logits_of(case, sample)
    cap = case.key_cap * amplitude_of(case, sample, logits)
    low, high, reached = 0.0, cap, 0
    for step in range(case.bisection_steps):
        middle = (low + high) / 2
        if logits.kl(middle) <= float(case.kappa[sample]):
            low, reached = middle, reached + 2 ** (case.bisection_steps - 1 - step)
        else:
            high = middle
    return reached


def value_mix(case: GuardCase, sample: int) -> float:
    """a_v = clamp(value_gain * a)."""
    a = amplitude_of(case, sample, logits_of(case, sample))
    return min(max(float(case.value_gain[sample]) * a, 0.0), 1.0)

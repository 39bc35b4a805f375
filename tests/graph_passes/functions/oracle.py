"""The key guard by its definition, in float64, for one sample at a time."""

import dataclasses

import numpy as np
import numpy.typing as npt

from graph_passes.parameters import SwsParameters

Wide = npt.NDArray[np.float64]


@dataclasses.dataclass
class Oracle:
    """One sample of a guard's inputs.

    Attributes:
        q: Queries before their temperature, [T', C].
        k: Keys, [T, C]; `k_perm` likewise.
        k_perm: Transported keys.
        heads: Number of heads.
        tau_q: Temperature.
    """

    q: npt.ArrayLike
    k: npt.ArrayLike
    k_perm: npt.ArrayLike
    heads: int
    tau_q: float

    def __post_init__(self) -> None:
        q, k, k_perm = (_heads(x, self.heads) for x in (self.q, self.k, self.k_perm))
        self._logits = q @ k.transpose(0, 2, 1) * q.shape[-1] ** -0.5 / self.tau_q
        self._delta = q @ (k_perm - k).transpose(0, 2, 1) * q.shape[-1] ** -0.5 / self.tau_q
        self._log_plain = _log_softmax(self._logits)

    def largest_logit(self) -> float:
        """Of the plain rows, in magnitude."""
        return float(np.abs(self._logits).max())

    def entropy(self) -> Wide:
        """Of the plain rows in nats, [h, T']."""
        return -(np.exp(self._log_plain) * self._log_plain).sum(-1)

    def entropy_factor(self) -> float:
        """Mean entropy between the lowest and the highest."""
        entropy = self.entropy()
        width = max(float(np.ptp(entropy)), 1e-6)
        return float(np.clip((entropy.mean() - entropy.min()) / width, 0, 1))

    def row_divergences(self, share: float) -> Wide:
        """KL of the rows under mixed keys to the plain ones in nats, [h, T']."""
        log_mixed = _log_softmax(self._logits + share * self._delta)
        return (np.exp(log_mixed) * (log_mixed - self._log_plain)).sum(-1)

    def divergence(self, share: float) -> float:
        """Mean over heads and rows."""
        return float(self.row_divergences(share).mean())

    def binding_budgets(self, mix: float, parameters: SwsParameters) -> list[float]:
        """Budgets of the default schedule, or ones that bind under the cap: up to 5, each once, ascending."""
        last = self.divergence(parameters.key_cap * mix * 127 / 128)
        pairs = ((0.09, 0.9), (0.06, 0.7), (0.03, 0.5), (0.02, 0.3), (0.01, 0.15))
        return sorted({budget if budget < last else max(last * share, 1e-3) for budget, share in pairs})

    def largest_step(self, mix: float, kappa: float, parameters: SwsParameters) -> int:
        """The step that the bisection ends at."""
        low, high = 0, 2**parameters.bisection_steps
        unit = parameters.key_cap * mix / high
        while high - low > 1:
            middle = (low + high) // 2
            if self.divergence(unit * middle) <= kappa:
                low = middle
            else:
                high = middle
        return low


def _heads(x: npt.ArrayLike, heads: int) -> Wide:
    array = np.asarray(x, np.float64)
    return array.reshape(len(array), heads, -1).transpose(1, 0, 2)


def _log_softmax(x: Wide) -> Wide:
    shifted = x - x.max(-1, keepdims=True)
    result: Wide = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result

"""The inputs of `sws.KeyGuard`."""

from typing import Any, NamedTuple


class GuardInputs(NamedTuple):
    """The inputs of `sws.KeyGuard`, in order.

    Attributes:
        q: Queries before their temperature, [B, T', C] of the model's dtype: all rows, or some of them.
        k: Keys [B, T, C] of the model's dtype.
        k_perm: Transported keys, as `k`.
        tau_q: Temperature of the queries, [B] float32; all that follow likewise.
        amplitude: intensity w(u): the amplitude a before it is multiplied by the entropy factor.
        kappa: KL budget in nats.
        key_gate: 0 if keys are not mixed, else 1.
        value_gain: a_v at an amplitude of 1.
    """

    q: Any
    k: Any
    k_perm: Any
    tau_q: Any
    amplitude: Any
    kappa: Any
    key_gate: Any
    value_gain: Any

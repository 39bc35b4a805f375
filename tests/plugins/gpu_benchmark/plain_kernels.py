"""The interface of `benchmarks.gpu.kernels.Kernels`, implemented in torch."""

import torch

from benchmarks.gpu.references import dense_transport, literal_guard


class PlainKernels:
    """Multiplies each result by `spoil`.

    `repeats` is False for results that differ from call to call, `writes` for outputs that are not written.
    """

    def __init__(self, spoil: float = 1.0, *, repeats: bool = True, writes: bool = True) -> None:
        self.spoil = spoil
        self.repeats = repeats
        self.writes = writes
        self.calls = 0

    def guard_workspace(self, *_):
        return torch.empty(16, dtype=torch.uint8)

    def banded_transport(self, weights, tensors, radius, outputs=None):
        dense = dense_transport(weights, radius)
        results = [(dense @ x.float() * self._factor()).to(x.dtype) for x in tensors]
        return self._write(results, outputs)

    def key_guard(self, q, k, k_perm, scalars, heads, *, outputs=None, **_):
        factor = self._factor()
        results = literal_guard(q, k, k_perm, scalars, heads, dtype=torch.float64)
        return self._write([x * factor for x in results], outputs)

    def _factor(self):
        self.calls += 1
        return self.spoil if self.repeats else self.spoil * (1 + 1e-7 * self.calls)

    def _write(self, results, outputs):
        if not self.writes:
            return outputs
        for output, result in zip(outputs or [], results, strict=bool(outputs)):
            output.copy_(result)
        return outputs or results

"""Recognizes dynamic sizes by their prime factors.

A module runs with batch, tokens, height and width that contain distinct primes which do not divide any
channel count. The prime factors of each size in the run then determine its symbolic expression.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

PRIMES = ((53, 107, 101, 103), (59, 127, 109, 113))
"""Primes of batch, tokens, height and width in two runs. A constant that was computed from a size differs
between the runs. Batch is below 64, because torch uses other memory layouts for larger ones."""
_NAMES = ("batch", "tokens", "height", "width")


@dataclasses.dataclass(frozen=True)
class TraceSizes:
    """The sizes of one run.

    Attributes:
        primes: One for each of batch, tokens, height and width.
        multiple: Divisor of height and width.
    """

    primes: Sequence[int]
    multiple: int

    def concrete(self) -> dict[str, int]:
        """batch, tokens, height and width of the run by name."""
        return {name: prime * self._unit(name) for name, prime in zip(_NAMES, self.primes, strict=True)}

    def symbolic(self, size: int) -> int | str:
        """`size` as an expression such as `height/2` or `height*width/64`; an int if it is static."""
        names, factor = [], Fraction(size)
        for name, prime in zip(_NAMES, self.primes, strict=True):
            while size and size % prime == 0:
                size //= prime
                factor /= prime * self._unit(name)
                names.append(name)
        if not names:
            return size
        product = "*".join(names)
        if factor.numerator != 1:
            product = f"{factor.numerator}*{product}"
        return product if factor.denominator == 1 else f"{product}/{factor.denominator}"

    def shape(self, sizes: Sequence[int]) -> list[int | str]:
        """`symbolic` of each."""
        return [self.symbolic(size) for size in sizes]

    def _unit(self, name: str) -> int:
        return self.multiple if name in ("height", "width") else 1

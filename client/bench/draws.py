"""What chance gives: the part of ``random.Random`` that load is drawn from.

Pure: whoever draws brings the generator, and with it the seed.
"""

from typing import Protocol


class Draws(Protocol):
    """``random.Random(seed)`` is one."""

    def random(self) -> float:
        """Evenly in 0 <= x < 1."""
        ...

    def gauss(self, mu: float, sigma: float, /) -> float: ...

    def gammavariate(self, alpha: float, beta: float, /) -> float:
        """With mean ``alpha * beta``."""
        ...

"""A sum in which what is long ago counts less."""

from __future__ import annotations

import math

__all__ = ["DecayingSum"]


class DecayingSum:
    """A sum of which half is forgotten in each `halving_s` seconds.

    Of something that goes on at a constant rate, it is what comes in `window_s`.
    """

    __slots__ = ("_at_s", "_halving_s", "_sum", "window_s")

    def __init__(self, halving_s: float) -> None:
        self.window_s = halving_s / math.log(2)
        self._halving_s = halving_s
        self._sum = 0.0
        self._at_s = 0.0

    def add(self, amount: float, now_s: float) -> None:
        """Add an amount now. `now_s` is on the monotonic clock."""
        self._sum = self.total(now_s) + amount
        self._at_s = now_s

    def total(self, now_s: float) -> float:
        """Return the sum as of now."""
        return self._sum * math.exp2((self._at_s - now_s) / self._halving_s) if self._sum else 0.0

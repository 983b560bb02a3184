"""How long calls wait for what they can do without."""

from __future__ import annotations

import math
import time

__all__ = ["Patience"]


class Patience:
    """A time that all calls of a connection may spend together, waiting for what would make them faster.

    It begins when a call first waits. Once it is over, no call waits: what is being looked for is found in the
    background, for later calls. Thread-safe.

    Args:
        limit_s: How long it is, in seconds. Infinite by default: then only the caller's own limit counts.
    """

    def __init__(self, limit_s: float = math.inf) -> None:
        self._limit_s = limit_s
        self._end_s: float | None = None

    def remaining_s(self) -> float:
        """Return how many seconds are left; 0 once it is over. The first use begins it."""
        now_s = time.monotonic()
        if self._end_s is None:
            self._end_s = now_s + self._limit_s
        return max(self._end_s - now_s, 0.0)

"""The deadline of a call. It is made once, where the call begins, and passed down to everything that waits."""

from __future__ import annotations

import time

__all__ = ["Deadline"]


class Deadline:
    """The moment by which a call must have ended.

    Attributes:
        timeout_s: How long the call may take in all, in seconds; for messages.

    Args:
        timeout_s: Seconds from now.
    """

    __slots__ = ("_at_s", "timeout_s")

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s: float = timeout_s
        self._at_s = time.monotonic() + timeout_s

    def remaining_s(self) -> float:
        """Return how many seconds are left; 0 once the deadline has passed."""
        return max(self._at_s - time.monotonic(), 0.0)

    def with_limit(self, limit_s: float) -> Deadline:
        """Return the earlier of this deadline and the moment `limit_s` seconds from now."""
        return Deadline(min(self.remaining_s(), limit_s))

    def __repr__(self) -> str:
        return f"<Deadline in {self.remaining_s():.3f} s>"

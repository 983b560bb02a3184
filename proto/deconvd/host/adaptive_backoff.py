"""Adaptive back-off: an optimization is tried less and less often while it does not pay off."""

from __future__ import annotations

from typing import Final

__all__ = ["AdaptiveBackoff"]

_MAX_SKIPS_COUNT: Final = 64
"""The largest number of occasions that are skipped before the next trial."""


class AdaptiveBackoff:
    """Decides on each occasion whether to try an optimization, from the outcomes of earlier trials.

    After each trial that does not pay off, about twice as many occasions are skipped (1, 3, 7, ... 63, 64). One success
    ends the skipping. Several threads may share one object without a lock: a race changes the counts by a few.
    """

    def __init__(self) -> None:
        self._skips_count = 0
        self._skips_left_count = 0

    def is_due(self) -> bool:
        """Return whether to try on this occasion. Call it once for each occasion, since it counts them."""
        if self._skips_left_count > 0:
            self._skips_left_count -= 1
            return False
        return True

    def record_outcome(self, *, has_paid: bool) -> None:
        """Record whether a trial has paid off."""
        if has_paid:
            self._skips_count = 0
        else:
            self._skips_count = min(2 * self._skips_count + 1, _MAX_SKIPS_COUNT)
            self._skips_left_count = self._skips_count

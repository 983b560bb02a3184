"""What pays only now and then, and is tried less and less often while it does not."""

from __future__ import annotations

from typing import Final

__all__ = ["AdaptiveBackoff"]

_MAX_SKIPS_COUNT: Final = 64
"""Occasions that are let pass, at most, before it is tried again."""


class AdaptiveBackoff:
    """Whether to try something on an occasion, by what came of it on the last ones.

    Threads may use it together: what they lose are occasions.
    """

    def __init__(self) -> None:
        self._skips_count = 0
        self._skips_left_count = 0

    def is_due(self) -> bool:
        """Return whether to try it on this occasion; one answer for each."""
        if self._skips_left_count > 0:
            self._skips_left_count -= 1
            return False
        return True

    def record_outcome(self, *, has_paid: bool) -> None:
        """Learn what came of a trial."""
        if has_paid:
            self._skips_count = 0
        else:
            self._skips_count = min(2 * self._skips_count + 1, _MAX_SKIPS_COUNT)
            self._skips_left_count = self._skips_count

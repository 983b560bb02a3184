"""Back-off: after a failure the server is not asked again for a while."""

from __future__ import annotations

import time
from typing import Final

__all__ = ["Backoff"]

_FIRST_PAUSE_S: Final = 5.0
"""The pause after the first failure; it doubles with each further one."""

_MAX_PAUSE_S: Final = 80.0
"""The longest pause."""


class Backoff:
    """A pause after each failure: twice as long as the one before it, until a success. Not thread-safe.

    Args:
        first_s: The first pause, in seconds.
        last_s: The longest pause, in seconds.
    """

    def __init__(self, first_s: float = _FIRST_PAUSE_S, last_s: float = _MAX_PAUSE_S) -> None:
        self._last_s = last_s
        self._first_s = self._pause_s = first_s
        self._until_s = 0.0

    @property
    def is_pending(self) -> bool:
        """Whether there is a pause now."""
        return time.monotonic() < self._until_s

    @property
    def remaining_s(self) -> float:
        """How many seconds of the pause are left; 0 if there is none."""
        return max(self._until_s - time.monotonic(), 0.0)

    def note_failure(self) -> None:
        """Start a pause."""
        self._until_s = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, self._last_s)

    def note_success(self) -> None:
        """End the pause, and make the next one as short as the first."""
        self._until_s = 0.0
        self._pause_s = self._first_s

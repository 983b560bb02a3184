"""How long what a server does not do is not asked of it again."""

from __future__ import annotations

import time
from typing import Final

__all__ = ["Backoff"]

_FIRST_PAUSE_S: Final = 5.0
_MAX_PAUSE_S: Final = 80.0
"""At first, and at most."""


class Backoff:
    """A pause after each failure: twice as long as the one before, until a success.

    Args:
        first_s: The first pause, in seconds.
        last_s: The longest.
    """

    def __init__(self, first_s: float = _FIRST_PAUSE_S, last_s: float = _MAX_PAUSE_S) -> None:
        self._last_s = last_s
        self._first_s = self._pause_s = first_s
        self._until_s = 0.0

    @property
    def is_pending(self) -> bool:
        """Whether the pause is not over."""
        return time.monotonic() < self._until_s

    def note_failure(self) -> None:
        """Begin a pause."""
        self._until_s = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, self._last_s)

    def note_success(self) -> None:
        """End the pause."""
        self._until_s = 0.0
        self._pause_s = self._first_s

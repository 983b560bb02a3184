"""Guesses which of a server's direct connections is called next: only that one is worth busy polling."""

from __future__ import annotations

__all__ = ["LastCaller"]


class LastCaller:
    """Remembers on which connections the last two calls came. Threads share it without a lock: it is only a guess."""

    def __init__(self) -> None:
        self._last: object = None
        self._is_sole = False

    def note_call(self, connection: object) -> None:
        """Note that a call has come on a connection."""
        self._is_sole = self._last is connection
        self._last = connection

    def is_sole_caller(self, connection: object) -> bool:
        """Return whether the last two calls both came on this connection."""
        return self._is_sole and self._last is connection

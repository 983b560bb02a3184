"""Which of a server's lines is likely to be called next."""

from __future__ import annotations

__all__ = ["LastCaller"]


class LastCaller:
    """Whose call came last. Threads may use it together."""

    def __init__(self) -> None:
        self._last: object = None
        self._is_undivided = False

    def note_call(self, line: object) -> None:
        """Note that a call has come on a line."""
        self._is_undivided = self._last is line
        self._last = line

    def is_sole_caller(self, line: object) -> bool:
        """Return whether the last calls all came on one line, and that is it."""
        return self._is_undivided and self._last is line

"""Tells whether a loop still runs: one that is blocked does nothing that is due."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

__all__ = ["Heartbeat"]

_PERIOD_S: Final = 1.0


class Heartbeat:
    """Has a loop note the time about once a second. Any thread may read it.

    Args:
        call_later: Has the loop call a function after a number of seconds. It is called here for the first time.
    """

    def __init__(self, call_later: Callable[[float, Callable[[], None]], object]) -> None:
        self._call_later = call_later
        self._beat()

    @property
    def age_s(self) -> float:
        """How long ago the last one was, in seconds."""
        return time.monotonic() - self._beat_s

    def _beat(self) -> None:
        self._beat_s = time.monotonic()
        self._call_later(_PERIOD_S, self._beat)

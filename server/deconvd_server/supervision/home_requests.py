"""Asks the supervisor for the homes of clients that begin. See `deconvd_server.supervision.home_claims`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from itertools import count
from queue import Empty, SimpleQueue
from typing import Final

__all__ = ["HomeRequests"]

_PATIENCE_S: Final = 1.0
"""How long a client waits for the supervisor. Without its answer it chooses itself."""

_SILENCE_S: Final = 5.0
"""For how long it is not asked after that: no client should wait for one that hangs."""

_MOST_REQUESTS_COUNT: Final = 32
"""How many clients wait at a time. It answers in less than a millisecond."""

_NUMBER_BYTES: Final = 8

_log = logging.getLogger(__name__)


class HomeRequests:
    """What clients wait for, by the numbers of their requests. Thread-safe."""

    def __init__(self) -> None:
        self._numbers = count()
        self._waiting: dict[bytes, SimpleQueue[str]] = {}
        self._silent_until_s = -math.inf

    def request(self, send: Callable[[bytes], None]) -> str:
        """Return the name of the worker to which a client should keep; empty if the supervisor does not say it.

        Args:
            send: Sends a number to the supervisor, which answers with the number, and the name after it.
        """
        is_full = len(self._waiting) >= _MOST_REQUESTS_COUNT
        if is_full or time.monotonic() < self._silent_until_s:
            return ""
        number = next(self._numbers).to_bytes(_NUMBER_BYTES, "little")
        answer = self._waiting[number] = SimpleQueue()
        try:
            send(number)
            return answer.get(timeout=_PATIENCE_S)
        except Empty:
            _log.warning("the supervisor does not say where a client should keep to")
            self._silent_until_s = time.monotonic() + _SILENCE_S
            return ""
        finally:
            del self._waiting[number]

    def note_answer(self, contents: bytes) -> None:
        """Give a client its answer, if it still waits."""
        waiting = self._waiting.get(contents[:_NUMBER_BYTES])
        if waiting is not None:
            waiting.put(contents[_NUMBER_BYTES:].decode())

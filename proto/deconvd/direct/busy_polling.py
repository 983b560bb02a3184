"""Busy polling: a thread that waits for data polls for a moment before it sleeps.

A thread that sleeps in the kernel takes tens of microseconds to wake up, and then runs its first Python code at a
fraction of the normal speed. For a small call that takes as long as all other work together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final, Protocol

from deconvd.host.adaptive_backoff import AdaptiveBackoff
from deconvd.host.system import processors_count

__all__ = ["BusyPolling"]

_SMOOTHING: Final = 1 / 4
"""Factor of the exponential smoothing: how much one longer wait raises the usual wait."""

# On one processor, polling would keep the peer on the same host from running.
_HAS_SEVERAL_PROCESSORS: Final = processors_count() > 1


class _Readable(Protocol):
    """A connection that data arrives on."""

    def poll(self, timeout_s: float) -> bool:
        """Return whether data arrives within `timeout_s` seconds."""

    def wait(self) -> None:
        """Return when data has arrived."""


class BusyPolling:
    """Polls while that pays off, and less and less often while it does not. Several threads may share one object.

        wait() is called                  data usually arrives
        |------- sleep in poll() --------|<---- lead_s ------>|
                                         |---- busy polling for at most max_poll_s ----|--- sleep

    Args:
        max_poll_s: How long a thread polls before it sleeps, in seconds.
        lead_s: How long before the usual arrival the polling begins, in seconds. Until then the thread sleeps. By
            default the polling begins at once.
    """

    def __init__(self, max_poll_s: float, *, lead_s: float = math.inf) -> None:
        self._max_poll_s = max_poll_s
        self._lead_s = lead_s
        self._usual_wait_s = 0.0
        self._backoff = AdaptiveBackoff()

    def wait(self, incoming: _Readable, is_worth_it: Callable[[], bool]) -> None:
        """Return when data, or the end of the connection, has arrived.

        Args:
            is_worth_it: Returns whether the processor is likely to be free. Called again and again while polling.

        Raises:
            ConnectionTimeoutError: Nothing arrived before the deadline.
        """
        is_polled = _HAS_SEVERAL_PROCESSORS and is_worth_it() and self._backoff.is_due()
        if not is_polled or not self._busy_poll(incoming, is_worth_it):
            incoming.wait()

    def _busy_poll(self, incoming: _Readable, is_worth_it: Callable[[], bool]) -> bool:
        """Return whether data has arrived. False means that the thread should stop polling and sleep."""
        begin_s = time.monotonic()
        sleep_s = max(self._usual_wait_s - self._lead_s, 0)
        until_s = begin_s + sleep_s + self._max_poll_s
        has_come = sleep_s > 0 and incoming.poll(sleep_s)
        while not has_come and is_worth_it() and time.monotonic() < until_s:
            has_come = incoming.poll(0)
        self._backoff.record_outcome(has_paid=has_come)
        self._update_usual_wait(time.monotonic() - begin_s, has_come=has_come)
        return has_come

    def _update_usual_wait(self, waited_s: float, *, has_come: bool) -> None:
        """Update the estimate of the usual wait. Without an arrival, `waited_s` is a lower bound of the wait."""
        if not has_come:
            self._usual_wait_s = max(waited_s, self._usual_wait_s)
        elif waited_s < self._usual_wait_s:
            self._usual_wait_s = waited_s  # follow short waits at once, so as not to oversleep
        else:
            self._usual_wait_s += (waited_s - self._usual_wait_s) * _SMOOTHING

"""Busy polling: a thread looks for what comes again and again for a moment, before it sleeps until it comes.

A thread that sleeps in the kernel takes tens of microseconds to wake, and then runs its first Python at a fraction of
its speed: for a small call that is as long as all the rest.
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
"""How much of a longer wait goes into what is usual: the factor of exponential smoothing."""

# with one processor, what is waited for could not happen meanwhile
_HAS_SEVERAL_PROCESSORS: Final = processors_count() > 1


class _Readable(Protocol):
    """Where something comes: a byte stream, or a line."""

    def poll(self, timeout_s: float) -> bool:
        """Return whether something comes within so many seconds."""

    def wait(self) -> None:
        """Return once something comes."""


class BusyPolling:
    """Polls where that has paid: ever more seldom where it has not. Threads may use it together.

    Args:
        longest_s: Seconds of polling after which a thread sleeps.
        ahead_s: How long before what is waited for usually comes the polling begins: a thread sleeps
            until then. By default it begins at once.
    """

    def __init__(self, longest_s: float, *, ahead_s: float = math.inf) -> None:
        self._max_poll_s = longest_s
        self._lead_s = ahead_s
        self._usual_wait_s = 0.0
        self._backoff = AdaptiveBackoff()

    def wait(self, incoming: _Readable, is_worth_it: Callable[[], bool]) -> None:
        """Return once something comes, if only the end.

        Args:
            is_worth_it: Whether no one else is likely to need the processor; asked again and again.

        Raises:
            ConnectionTimeoutError: Nothing does until the deadline.
        """
        is_polled = _HAS_SEVERAL_PROCESSORS and is_worth_it() and self._backoff.is_due()
        if not is_polled or not self._busy_poll(incoming, is_worth_it):
            incoming.wait()

    def _busy_poll(self, incoming: _Readable, is_worth_it: Callable[[], bool]) -> bool:
        """Return whether something has come: False once it is time to sleep until then."""
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
        """Take note how long it took to come, or takes at least."""
        if not has_come:
            self._usual_wait_s = max(waited_s, self._usual_wait_s)
        elif waited_s < self._usual_wait_s:
            self._usual_wait_s = waited_s  # what comes soon is what not to be late for
        else:
            self._usual_wait_s += (waited_s - self._usual_wait_s) * _SMOOTHING

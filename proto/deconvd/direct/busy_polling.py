"""Busy polling: a thread looks for what comes again and again for a moment, before it sleeps until it comes.

A thread that sleeps in the kernel takes tens of microseconds to wake, and then runs its first Python at a fraction of
its speed: for a small call that is as long as all the rest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final, Protocol

from deconvd.host.adaptive_backoff import Trials
from deconvd.host.system import processors_count

__all__ = ["BusyPolling"]

_SMOOTHING: Final = 1 / 4
"""How much of a longer wait goes into what is usual: the factor of exponential smoothing."""

# with one processor, what is waited for could not happen meanwhile
_IS_POSSIBLE: Final = processors_count() > 1


class _Incoming(Protocol):
    """Where something comes: a byte stream, or a line."""

    def has_come(self, timeout_s: float) -> bool:
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
        self._longest_s = longest_s
        self._ahead_s = ahead_s
        self._usual_s = 0.0
        self._trials = Trials()

    def wait(self, incoming: _Incoming, is_worth_it: Callable[[], bool]) -> None:
        """Return once something comes, if only the end.

        Args:
            is_worth_it: Whether no one else is likely to need the processor; asked again and again.

        Raises:
            LineTimeoutError: Nothing does until the deadline.
        """
        is_polled = _IS_POSSIBLE and is_worth_it() and self._trials.is_due()
        if not is_polled or not self._poll(incoming, is_worth_it):
            incoming.wait()

    def _poll(self, incoming: _Incoming, is_worth_it: Callable[[], bool]) -> bool:
        """Return whether something has come: False once it is time to sleep until then."""
        begin_s = time.monotonic()
        sleep_s = max(self._usual_s - self._ahead_s, 0)
        until_s = begin_s + sleep_s + self._longest_s
        has_come = sleep_s > 0 and incoming.has_come(sleep_s)
        while not has_come and is_worth_it() and time.monotonic() < until_s:
            has_come = incoming.has_come(0)
        self._trials.note(has_paid=has_come)
        self._learn(time.monotonic() - begin_s, has_come=has_come)
        return has_come

    def _learn(self, waited_s: float, *, has_come: bool) -> None:
        """Take note how long it took to come, or takes at least."""
        if not has_come:
            self._usual_s = max(waited_s, self._usual_s)
        elif waited_s < self._usual_s:
            self._usual_s = waited_s  # what comes soon is what not to be late for
        else:
            self._usual_s += (waited_s - self._usual_s) * _SMOOTHING

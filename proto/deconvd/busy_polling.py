"""Busy polling: a thread looks for what comes again and again for a moment, before it sleeps until it comes.

A thread that sleeps in the kernel takes tens of microseconds to wake, and then runs its first Python at a fraction of
its speed: for a small call that is as long as all the rest.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Final

from deconvd.line import Line
from deconvd.system import processors_count
from deconvd.trials import Trials

__all__ = ["BusyPolling"]

# with one processor, what is waited for could not happen meanwhile
_IS_POSSIBLE: Final = hasattr(select, "poll") and processors_count() > 1


class BusyPolling:
    """Polls lines where that has paid: ever more seldom where it has not.

    Args:
        longest_s: Seconds after which a thread sleeps.
    """

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._trials = Trials()

    def wait(self, line: Line, is_worth_it: Callable[[], bool]) -> None:
        """Return once something comes on a line, or it is time to sleep until then.

        Args:
            is_worth_it: Whether no one else is likely to need the processor; asked again and again.

        Raises:
            LineBrokenError: The line has ended.
        """
        if not _IS_POSSIBLE or not is_worth_it() or not self._trials.is_due():
            return
        until_s = time.monotonic() + self._longest_s
        has_come = False
        while not has_come and is_worth_it() and time.monotonic() < until_s:
            has_come = line.has_come(1, 0)
        self._trials.note(has_paid=has_come)

"""Refuses calls while a device has more work than it can do in time, and learns from the others how fast it is."""

from __future__ import annotations

from typing import Final, NoReturn

from deconvd.errors import UnavailableError
from deconvd_server.call.context import CallContext
from deconvd_server.engine.fair_queue import FairQueue, Ticket
from deconvd_server.engine.place_clock import PlaceSpan
from deconvd_server.engine.queue_limits import QueueLimits, Refusal, RefusalReason, WaitLimit
from deconvd_server.engine.workload import Workload

__all__ = ["OverloadGuard"]

_RETRY_AFTER_S: Final = 0.5
"""How long a refused caller should wait if the server cannot tell: it has measured no call yet, or residents are in the
way."""

_LEAST_RETRY_S: Final = 0.01
_MOST_RETRY_S: Final = 30.0
"""The bounds of that time where it can tell: an estimate is not exact, and calls may be given up any time."""


class OverloadGuard:
    """Decides which calls are refused, and keeps the books for that. Not thread-safe: `Admission` has a lock.

    Attributes:
        work: The work that the calls are. There is none without a `WaitLimit`.
        refused_counts: How many calls were refused so far, by reason.

    Args:
        limits: The places in the queue.
        wait_limit: How long a call may wait; None for as long as it likes.
        places_count: How many calls run at once.
    """

    def __init__(
        self, limits: QueueLimits, wait_limit: WaitLimit | None, places_count: int
    ) -> None:
        self._limits = limits
        self._wait_limit = wait_limit
        self.work = Workload(places_count)
        self.refused_counts: dict[str, int] = dict.fromkeys(RefusalReason, 0)

    def check(
        self, ticket: Ticket, call: CallContext, queue: FairQueue, wait_s: float | None
    ) -> None:
        """Raise UnavailableError if a call may neither start nor join the queue.

        Args:
            wait_s: How long it would wait for a place in the queue, as fast as calls leave it; None if it may start.
        """
        if wait_s is not None and (refusal := self._limits.refusal(ticket, queue)) is not None:
            self._refuse(refusal, wait_s)
        if self._wait_limit is None or not ticket.cost_s or call.is_accepted:
            return
        delay_s, is_overloaded = self.work.estimate_wait(ticket.peer, ticket.cost_s)
        limit_s = self._wait_limit.limit_s(
            ticket.cost_s, call.remaining_s(), is_overloaded=is_overloaded, waits=call.waits
        )
        if delay_s > limit_s:
            text = f"the server is full: the call would wait for {delay_s:.3g} s, and may wait for {limit_s:.3g} s"
            # When the work is done beyond which the call need not wait. But others were refused, too: of those of the
            # last second, half come back before this one on average.
            retry_after_s = max(delay_s - limit_s, self.work.refuse(ticket.cost_s) / 2)
            self._refuse(Refusal(RefusalReason.TIME, text), retry_after_s)

    def refuse_for_residents(self, text: str) -> NoReturn:
        """Refuse a call to which residents leave no room. How long they stay, nobody knows."""
        self._refuse(Refusal(RefusalReason.RESIDENTS, text), 0.0)

    def begin(self, span: PlaceSpan, cost_s: float) -> None:
        """Count the work of a call that is let in."""
        span.cost_s = cost_s
        self.work.add(span.call.peer_key, cost_s)

    def discount(self, span: PlaceSpan) -> None:
        """Count the work of a call no more that was let in: it has ended, or gave up before it had a place."""
        self.work.remove(span.call.peer_key, span.cost_s)
        span.cost_s = 0.0  # a call whose operands come late enters again with its span

    def end(self, span: PlaceSpan, footprint_bytes: int) -> None:
        """Count the work of a call no more, and learn from how long it took. Its span has ended."""
        if span.cost_s:
            self.discount(span)
        if span.is_measured:
            self.work.note(footprint_bytes, span.place_s, span.share_s)

    def _refuse(self, refusal: Refusal, retry_after_s: float) -> NoReturn:
        self.refused_counts[refusal.reason] += 1
        if retry_after_s:
            retry_after_s = min(max(retry_after_s, _LEAST_RETRY_S), _MOST_RETRY_S)
        raise UnavailableError(refusal.text, retry_after_s=retry_after_s or _RETRY_AFTER_S)

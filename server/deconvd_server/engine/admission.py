"""Admission: which calls may start now, which wait in a queue, and which are refused.

Locks: one lock guards an `Admission`, and all its tickets' conditions share it. It may be taken with other locks held,
but nothing that takes another lock is called with it held: `make_room` (which evicts tensors) and the callbacks of a
`CallContext` run without it. Calls use `admit` and `yield_turn`; engines use `reserve` and `release` for tensors.
Which calls are
refused is decided in `overload`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

from deconvd.errors import ExhaustedError
from deconvd_server.call.context import CallContext
from deconvd_server.call.ledger import Stage
from deconvd_server.device import TURN_S
from deconvd_server.engine.admission_scope import AdmissionScope
from deconvd_server.engine.answer_shares import AnswerShares
from deconvd_server.engine.fair_queue import FairQueue, Ticket
from deconvd_server.engine.load import Load
from deconvd_server.engine.overload import OverloadGuard
from deconvd_server.engine.place_clock import PlaceClock, PlaceSpan
from deconvd_server.engine.queue_limits import QueueLimits, WaitLimit, longest_wait_s
from deconvd_server.engine.workload import LEAST_WORK_S

__all__ = ["Admission"]

_SHARES_COUNT: Final = 4
"""One peer's calls may keep one part in this many of the budget until their answers are sent. So a client that reads
none of its answers, even from three addresses at once, leaves others some."""

_PATIENCE_S: Final = 2.0
"""How long a call may block the queue while it lacks bytes of answers that are being sent.

Most answers are sent within milliseconds, and some never are.
"""


class Admission:
    """Lets calls start in an order that is fair between peers, while there are places and bytes left.

        enter ----------------------> running --leave--> answer is sent --end--> everything is given back
          |                           ^  |  ^            (lasting bytes)
          +--> queued --first, and ---+  |  |
                        there is room    +--+ yield_turn: paused until a place is free

    The order is that of `FairQueue`: many calls of one peer do not keep those of others waiting. A call that would wait
    for too long is refused when it comes, even if a place is free: it would make those that run slower.

    A long call gives up its place after each turn (`yield_turn`), but keeps its bytes. While both new
    calls and paused calls wait, each kind gets half of the places.

    A call gets all its bytes at once: if calls waited with some of their bytes, they could wait for each
    other forever. Some bytes may last until the call's answer is sent, and a client that does not read
    keeps them as long as it likes. Therefore each peer has a share of lasting bytes (`AnswerShares`):
    a call whose peer has used up its share waits for that peer's other calls, and does not block the
    calls of other peers.

    Bytes can also be reserved beyond a call (`reserve`). A call waits for other calls but never for
    reserved bytes: if it does not fit next to them, it is refused. While a call waits, no bytes are
    reserved that would leave it no room.

    Args:
        calls_count: How many calls may run at once.
        budget_bytes: How many bytes all calls and reservations may use together.
        waiting_count: How many more calls may wait, of all peers. Peers share these places: see `QueueLimits`.
        waiting_bytes: How many bytes waiting calls may have received, in addition to the budget; None for a
            quarter of the budget. They are shared as the places are.
        wait_limit: How long a call may wait; None for as long as it likes.
        memory: Which memory the bytes are of, for errors.
        make_room: Called, in the call's thread, for a call that does not fit next to reserved bytes, with the
            bytes that it lacks and the call. It may `release` some.
    """

    _POLL_PERIOD_S = 0.5
    """How often a paused call checks whether it may go on, and whether it is still wanted."""

    def __init__(
        self,
        calls_count: int,
        budget_bytes: int,
        waiting_count: int,
        *,
        waiting_bytes: int | None = None,
        wait_limit: WaitLimit | None = None,
        memory: str = "the device's memory",
        make_room: Callable[[int, CallContext], None] = lambda *_: None,
    ) -> None:
        self._memory = memory
        self._make_room = make_room
        self._calls_count = calls_count
        self._clock = PlaceClock()
        self._budget_bytes = budget_bytes
        self._free_bytes = budget_bytes
        self._reserved_bytes = 0
        if waiting_bytes is None:
            waiting_bytes = budget_bytes // 4
        limits = QueueLimits(waiting_count, waiting_bytes)
        self.has_wait_limit: Final = wait_limit is not None
        self._guard = OverloadGuard(limits, wait_limit, calls_count)
        self._shares = AnswerShares(budget_bytes // _SHARES_COUNT)
        self._leaving_bytes = 0  # of calls that are computed, and whose answers are not sent yet
        self._takes_turns = False
        self._queue = FairQueue()
        self._paused: deque[Ticket] = deque()  # they have their bytes, and wait for a place
        self._turned_s = 0.0  # when a paused call last began or ended a turn (monotonic clock)
        self._lock = threading.Lock()

    def admit(
        self,
        footprint_bytes: int,
        call: CallContext,
        *,
        lasting_bytes: int = 0,
        brought_bytes: int = 0,
    ) -> AbstractContextManager[None]:
        """Hold a place and `footprint_bytes` for the length of the block, after waiting for them.

        Args:
            lasting_bytes: How many of them the call keeps after the block, until `CallContext.on_end`. If the
                block raises, it keeps none.
            brought_bytes: How many of them it uses already while it waits.

        Raises:
            ExhaustedError: The call would never fit.
            UnavailableError: The queue is full, the call would wait for too long, or reserved bytes leave it no room.
            CallCancelledError, DeadlineError: The call ended while it waited.
        """
        return AdmissionScope(self, call, footprint_bytes, lasting_bytes, brought_bytes)

    def enter(
        self,
        footprint_bytes: int,
        call: CallContext,
        lasting_bytes: int = 0,
        brought_bytes: int = 0,
        span: PlaceSpan | None = None,
    ) -> None:
        """Take a place and bytes, which `leave` and `end` give back. Otherwise as `admit`.

        Args:
            span: The time for which the call has its place, for `leave`, too; None not to measure it.
        """
        peer, work = call.peer_key, self._guard.work
        with self._lock:
            cost_s = work.alone_s.get(footprint_bytes, work.mean_s)
            if (
                not self._queue
                and not self._paused
                and self._clock.running_count < self._calls_count
                and self._free_bytes >= footprint_bytes
                and (not lasting_bytes or self._shares.has_room(peer, lasting_bytes))
                and (not cost_s or not work.total_s)
            ):
                self._clock.begin(span)
                self._free_bytes -= footprint_bytes
                if lasting_bytes:
                    self._shares.take(peer, lasting_bytes)
                if cost_s and span is not None:
                    self._guard.begin(span, cost_s)
                return
        call.note_long()
        # a condition for each ticket: `_wake_first` wakes one call, not all that wait
        changed = threading.Condition(self._lock)
        until_s = time.monotonic() + _PATIENCE_S
        ticket = Ticket(
            footprint_bytes, lasting_bytes, brought_bytes, peer, until_s, changed, cost_s
        )
        with call.ledger.measure(Stage.QUEUE):
            self._wait(ticket, call, span)

    def check_fits(self, footprint_bytes: int) -> None:
        """Raise ExhaustedError if a call with that footprint could never be admitted."""
        if footprint_bytes > self._budget_bytes:
            raise ExhaustedError(
                f"the call needs {footprint_bytes} bytes of {self._memory}, of which calls may "
                f"take {self._budget_bytes}: send fewer samples at a time"
            )

    def leave(
        self, footprint_bytes: int, lasting_bytes: int = 0, span: PlaceSpan | None = None
    ) -> None:
        """Give back what `enter` took, except for the lasting bytes, which `end` gives back.

        Args:
            span: What `enter` was given.
        """
        with self._lock:
            self._clock.end(span)
            self._free_bytes += footprint_bytes - lasting_bytes
            self._leaving_bytes += lasting_bytes
            # most calls are known to be small, and cost no further function
            if span is not None:
                is_small = (
                    span.place_s < LEAST_WORK_S and footprint_bytes in self._guard.work.alone_s
                )
                if span.cost_s or not is_small:
                    self._guard.end(span, footprint_bytes)
            if self._queue or self._paused:
                self._wake_first()

    def end(self, lasting_bytes: int, peer: str) -> None:
        """Give back lasting bytes."""
        with self._lock:
            self._leaving_bytes -= lasting_bytes
            if lasting_bytes:
                self._shares.give_back(peer, lasting_bytes)
            self._free_bytes += lasting_bytes
            if self._queue or self._paused:
                self._wake_first()

    def yield_turn(self, call: CallContext) -> None:
        """Give up a running call's place to one that waits; return once the call has a place again.

        The call keeps its bytes. If no call waits for a place, this returns at once.

        Raises:
            CallCancelledError, DeadlineError: The call has ended. It has a place all the same, to be given back.
        """
        # read without the lock, since devices ask often: a call that joins now is seen at the next turn
        if not self._queue and not self._paused:
            return
        with self._lock, call.ledger.measure(Stage.QUEUE):
            ticket = Ticket(0, 0, 0, call.peer_key, 0.0, threading.Condition(self._lock))
            self._paused.append(ticket)
            self._clock.end()
            self._turned_s = since_s = self._clock.now_s
            since_share_s = self._clock.share_s
            self._takes_turns = True
            self._wake_first()
            try:
                while self._next() is not ticket:
                    remaining_s = call.remaining_s()
                    is_pressed = remaining_s is not None and remaining_s < self._POLL_PERIOD_S
                    ticket.changed.wait(remaining_s if is_pressed else self._POLL_PERIOD_S)
                    call.check()
                    self._wake_first()  # time has passed: it may be another call's turn
            finally:
                self._paused.remove(ticket)
                self._clock.begin()
                self._turned_s = self._clock.now_s
                call.paused_s += self._clock.now_s - since_s
                call.paused_share_s += self._clock.share_s - since_share_s
                self._wake_first()

    def reserve(self, size_bytes: int) -> None:
        """Take bytes until they are released. This does not wait.

        Raises:
            ExhaustedError: Fewer bytes are free now, or a waiting call would not fit next to them.
        """
        with self._lock:
            spare_bytes = self._unreserved_bytes - max(
                (ticket.footprint_bytes for ticket in self._queue), default=0
            )
            free_bytes = max(min(self._free_bytes, spare_bytes), 0)
            if size_bytes > free_bytes:
                raise ExhaustedError(
                    f"{size_bytes} bytes of {self._memory} cannot be reserved: {free_bytes} of "
                    f"{self._budget_bytes} are free, the others are used by calls or reserved"
                )
            self._free_bytes -= size_bytes
            self._reserved_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """Give back reserved bytes."""
        with self._lock:
            self._free_bytes += size_bytes
            self._reserved_bytes -= size_bytes
            self._wake_first()

    @property
    def load(self) -> Load:
        """How many calls run and wait, and how many bytes are used and reserved, now."""
        with self._lock:
            return Load(
                running_count=self._clock.running_count,
                waiting_count=len(self._queue) + len(self._paused),
                used_bytes=self._unreserved_bytes - self._free_bytes,
                reserved_bytes=self._reserved_bytes,
                wait_s=self._wait_s() if self._queue or not self._has_place() else 0.0,
                refused_counts=dict(self._guard.refused_counts),
            )

    @property
    def busy_us(self) -> int:
        """For how long at least one call has run, so far."""
        with self._lock:
            return round(self._clock.busy_s * 1e6)

    @property
    def taken_bytes(self) -> int:
        """What calls take and what is held, together, now."""
        return self._budget_bytes - self._free_bytes

    @property
    def _unreserved_bytes(self) -> int:
        """How many bytes calls may use together next to the reserved ones."""
        return self._budget_bytes - self._reserved_bytes

    def _wait(self, ticket: Ticket, call: CallContext, span: PlaceSpan | None) -> None:
        """Wait in the queue until the call may start, and take what it needs."""
        self.check_fits(ticket.footprint_bytes)
        with self._lock:
            missing_bytes = ticket.footprint_bytes - self._unreserved_bytes
        if missing_bytes > 0:
            self._make_room(missing_bytes, call)  # without the lock: it calls `release`

        def wake() -> None:
            with self._lock:
                ticket.changed.notify()

        call.on_cancel(wake)
        try:
            with self._lock:
                if ticket.footprint_bytes > self._unreserved_bytes:
                    self._guard.refuse_for_residents(
                        f"the call needs {ticket.footprint_bytes} bytes of {self._memory}, of which "
                        f"{self._budget_bytes} are for calls and resident tensors, and resident tensors have "
                        f"{self._reserved_bytes} now"
                    )
                must_wait = bool(self._queue) or not self._has_room(ticket.footprint_bytes)
                self._guard.check(ticket, call, self._queue, self._wait_s() if must_wait else None)
                if ticket.cost_s and span is not None:
                    self._guard.begin(span, ticket.cost_s)
                self._queue.add(ticket)
                has_started = False
                try:
                    while self._next() is not ticket:
                        # `wake` needs the lock, so it cannot notify between this check and the wait
                        call.check()
                        ticket.changed.wait(longest_wait_s(ticket, call))
                        self._wake_first()  # time has passed: it may be another call's turn
                    self._clock.begin(span)
                    self._free_bytes -= ticket.footprint_bytes
                    if ticket.lasting_bytes:
                        self._shares.take(ticket.peer, ticket.lasting_bytes)
                    has_started = True
                finally:
                    self._queue.take_out(ticket, has_started=has_started)
                    if span is not None and span.cost_s and not has_started:
                        self._guard.discount(span)
                    self._wake_first()
        finally:
            call.remove_on_cancel(wake)  # a call of many slices may wait for each of them

    def _wait_s(self) -> float:
        """Return how long a further call would wait, as fast as places become free; 0 if that is not known yet."""
        place_s = self._clock.mean_place_s
        if self._takes_turns:
            place_s = min(place_s, TURN_S)  # while others wait
        return (len(self._queue) + len(self._paused) + 1) * place_s / self._calls_count

    def _first(self) -> Ticket | None:
        """Return the first queued call that does not wait for answers which may never be sent; None if there is none.

        Its bytes may still be in use. It is passed over if its peer's share is used up, or if it lacks bytes
        of answers that are being sent and its patience has ended.
        """
        for ticket in self._queue:
            lasting_bytes = ticket.lasting_bytes
            is_within_share = not lasting_bytes or self._shares.has_room(ticket.peer, lasting_bytes)
            fits = ticket.footprint_bytes <= self._unreserved_bytes - self._leaving_bytes
            if is_within_share and (fits or time.monotonic() < ticket.patient_until_s):
                return ticket
        return None

    def _next(self) -> Ticket | None:
        """Return the queued or paused call that may have a place now; None if there is none."""
        if not self._has_place():
            return None
        first = self._first() if self._queue else None
        if first is not None and not self._has_room(first.footprint_bytes):
            first = None
        if not self._paused:
            return first
        # turns begin at least this far apart while new calls wait: paused calls get about half of the places
        is_resume_due = time.monotonic() >= self._turned_s + TURN_S / self._calls_count
        return self._paused[0] if first is None or is_resume_due else first

    def _has_place(self) -> bool:
        return self._clock.running_count < self._calls_count

    def _has_room(self, footprint_bytes: int) -> bool:
        return self._has_place() and self._free_bytes >= footprint_bytes

    def _wake_first(self) -> None:
        """Wake the call that may have a place now. Only that one: there may be too many waiting calls to wake all."""
        following = self._next()
        if following is not None:
            following.changed.notify()

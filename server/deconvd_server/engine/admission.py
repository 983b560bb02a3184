"""Admission: which calls may start now, which wait in a queue, and which are refused.

Locks: one lock guards an `Admission`, and all its tickets' conditions share it. It may be taken with other locks held,
but nothing that takes another lock is called with it held: `make_room` (which evicts tensors) and the callbacks of a
`CallContext` run without it. Calls use `admit` and `yield_turn`; engines use `reserve` and `release` for tensors.
The limits of the queue are in `queue_limits`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Final

from deconvd.errors import ExhaustedError, UnavailableError
from deconvd_server.call.context import CallContext
from deconvd_server.call.ledger import Stage
from deconvd_server.device import TURN_S
from deconvd_server.engine.answer_shares import AnswerShares
from deconvd_server.engine.queue_limits import RETRY_AFTER_S, QueueLimits, Ticket, longest_wait_s

__all__ = ["Admission", "Load"]

_SHARES_COUNT: Final = 4
"""One peer's calls may keep one part in this many of the budget until their answers are sent.

So a client that reads none of its answers, even from three addresses at once, leaves others some.
"""

_PATIENCE_S: Final = 2.0
"""How long a call may block the queue while it lacks bytes of answers that are being sent.

Most answers are sent within milliseconds, and some never are.
"""


@dataclass(frozen=True, slots=True)
class Load:
    """How many calls run and wait, how many bytes running calls use, and how many are reserved."""

    running_count: int
    waiting_count: int
    used_bytes: int
    reserved_bytes: int = 0


class Admission:
    """Lets calls start in the order in which they came, while there are places and bytes left.

        enter ----------------------> running --leave--> answer is sent --end--> everything is given back
          |                           ^  |  ^            (lasting bytes)
          +--> queued --first, and ---+  |  |
                        there is room    +--+ yield_turn: paused until a place is free

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
        waiting_count: How many more calls may wait; the next one is refused.
        reserved_count: How many of the waiting places are for peers that have no waiting call, and the same
            part of `waiting_bytes`.
        waiting_bytes: How many bytes waiting calls may have received, in addition to the budget; None for a
            quarter of the budget.
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
        reserved_count: int = 0,
        waiting_bytes: int | None = None,
        memory: str = "the device's memory",
        make_room: Callable[[int, CallContext], None] = lambda *_: None,
    ) -> None:
        self._memory = memory
        self._make_room = make_room
        self._calls_count = calls_count
        self._free_places = calls_count
        self._budget_bytes = budget_bytes
        self._free_bytes = budget_bytes
        self._reserved_bytes = 0
        self._limits = QueueLimits(
            waiting_count,
            reserved_count,
            budget_bytes // 4 if waiting_bytes is None else waiting_bytes,
        )
        self._shares = AnswerShares(budget_bytes // _SHARES_COUNT)
        self._leaving_bytes = 0  # of calls that are computed, and whose answers are not sent yet
        self._queue: deque[Ticket] = deque()
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
            UnavailableError: The queue is full, or reserved bytes leave no room for the call.
            CallCancelledError, DeadlineError: The call ended while it waited.
        """
        return _AdmissionScope(self, call, footprint_bytes, lasting_bytes, brought_bytes)

    def enter(
        self,
        footprint_bytes: int,
        call: CallContext,
        lasting_bytes: int = 0,
        brought_bytes: int = 0,
    ) -> None:
        """Take a place and bytes, which `leave` and `end` give back. Otherwise as `admit`."""
        peer = call.peer_key
        with self._lock:
            if (
                not self._queue
                and not self._paused
                and self._free_places > 0
                and self._free_bytes >= footprint_bytes
                and (not lasting_bytes or self._shares.has_room(peer, lasting_bytes))
            ):
                self._free_places -= 1
                self._free_bytes -= footprint_bytes
                if lasting_bytes:
                    self._shares.take(peer, lasting_bytes)
                return
        # a condition for each ticket: `_wake_first` wakes one call, not all that wait
        changed = threading.Condition(self._lock)
        until_s = time.monotonic() + _PATIENCE_S
        ticket = Ticket(footprint_bytes, lasting_bytes, brought_bytes, peer, until_s, changed)
        with call.ledger.measure(Stage.QUEUE):
            self._wait(ticket, call)

    def check_fits(self, footprint_bytes: int) -> None:
        """Raise ExhaustedError if a call with that footprint could never be admitted."""
        if footprint_bytes > self._budget_bytes:
            raise ExhaustedError(
                f"the call needs {footprint_bytes} bytes of {self._memory}, of which calls may "
                f"take {self._budget_bytes}: send fewer samples at a time"
            )

    def leave(self, footprint_bytes: int, lasting_bytes: int = 0) -> None:
        """Give back what `enter` took, except for the lasting bytes, which `end` gives back."""
        with self._lock:
            self._free_places += 1
            self._free_bytes += footprint_bytes - lasting_bytes
            self._leaving_bytes += lasting_bytes
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
            self._free_places += 1
            self._turned_s = time.monotonic()
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
                self._free_places -= 1
                self._turned_s = time.monotonic()
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
                running_count=self._calls_count - self._free_places,
                waiting_count=len(self._queue) + len(self._paused),
                used_bytes=self._unreserved_bytes - self._free_bytes,
                reserved_bytes=self._reserved_bytes,
            )

    @property
    def taken_bytes(self) -> int:
        """What calls take and what is held, together, now."""
        return self._budget_bytes - self._free_bytes

    @property
    def _unreserved_bytes(self) -> int:
        """How many bytes calls may use together next to the reserved ones."""
        return self._budget_bytes - self._reserved_bytes

    def _wait(self, ticket: Ticket, call: CallContext) -> None:
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
                    raise UnavailableError(
                        f"the call needs {ticket.footprint_bytes} bytes of {self._memory}, of which "
                        f"{self._budget_bytes} are for calls and resident tensors, and resident tensors have "
                        f"{self._reserved_bytes} now",
                        retry_after_s=RETRY_AFTER_S,
                    )
                if self._queue or not self._has_room(ticket.footprint_bytes):
                    self._limits.check(ticket, self._queue)
                self._queue.append(ticket)
                try:
                    while self._next() is not ticket:
                        # `wake` needs the lock, so it cannot notify between this check and the wait
                        call.check()
                        ticket.changed.wait(longest_wait_s(ticket, call))
                        self._wake_first()  # time has passed: it may be another call's turn
                    self._take(ticket.footprint_bytes, ticket.peer, ticket.lasting_bytes)
                finally:
                    self._queue.remove(ticket)
                    self._wake_first()
        finally:
            call.remove_on_cancel(wake)  # a call of many slices may wait for each of them

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
        if self._free_places <= 0:
            return None
        first = self._first() if self._queue else None
        if first is not None and not self._has_room(first.footprint_bytes):
            first = None
        if not self._paused:
            return first
        # turns begin at least this far apart while new calls wait: paused calls get about half of the places
        is_resume_due = time.monotonic() >= self._turned_s + TURN_S / self._calls_count
        return self._paused[0] if first is None or is_resume_due else first

    def _has_room(self, footprint_bytes: int) -> bool:
        return self._free_places > 0 and self._free_bytes >= footprint_bytes

    def _take(self, footprint_bytes: int, peer: str, lasting_bytes: int) -> None:
        self._free_places -= 1
        self._free_bytes -= footprint_bytes
        if lasting_bytes:
            self._shares.take(peer, lasting_bytes)

    def _wake_first(self) -> None:
        """Wake the call that may have a place now. Only that one: there may be too many waiting calls to wake all."""
        following = self._next()
        if following is not None:
            following.changed.notify()


class _AdmissionScope(AbstractContextManager[None]):
    """A call's place for the length of a block. See `Admission.admit`."""

    __slots__ = ("_admission", "_brought_bytes", "_call", "_footprint_bytes", "_lasting_bytes")

    def __init__(
        self,
        admission: Admission,
        call: CallContext,
        footprint_bytes: int,
        lasting_bytes: int,
        brought_bytes: int,
    ) -> None:
        self._admission = admission
        self._call = call
        self._footprint_bytes = footprint_bytes
        self._lasting_bytes = lasting_bytes
        self._brought_bytes = brought_bytes

    def __enter__(self) -> None:
        self._admission.enter(
            self._footprint_bytes, self._call, self._lasting_bytes, self._brought_bytes
        )

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        admission, lasting_bytes = self._admission, self._lasting_bytes
        admission.leave(self._footprint_bytes, lasting_bytes)
        if lasting_bytes:
            end = partial(admission.end, lasting_bytes, self._call.peer_key)
            if exc_type is None:
                self._call.on_end(end)
            else:
                end()

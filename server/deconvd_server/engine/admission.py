"""Which calls may start now, which wait, and which are told to come back later. The line's limits: `waiting_line`."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from deconvd.errors import ExhaustedError, UnavailableError
from deconvd_server.call.context import CallContext
from deconvd_server.call.ledger import Stage
from deconvd_server.device import TURN_S
from deconvd_server.engine.answer_shares import AnswerShares
from deconvd_server.engine.queue_limits import RETRY_AFTER_S, QueueLimits, Ticket, longest_wait_s

__all__ = ["Admission", "Load", "PairedAdmission"]

_SHARES_COUNT: Final = 4
"""A peer's calls may keep this part of the budget until their answers have left. Who reads none of its answers, be it
from three addresses at once, leaves others some."""

_PATIENCE_S: Final = 2.0
"""How long after it came a call may keep others waiting while it lacks bytes of answers that are leaving: most leave
within milliseconds, and some never."""


@dataclass(frozen=True, slots=True)
class Load:
    """How many calls run and wait, what those that run take, and what is held beside them."""

    running_count: int
    waiting_count: int
    used_bytes: int
    reserved_bytes: int = 0


class Admission:
    """Lets calls start in the order they came, while places and bytes last.

    A long call gives up its place after each turn (`yield_turn`). While both new calls and paused calls wait, each kind
    gets half of the places.

    A call's bytes are taken all at once: a call that waited with some of them could wait for itself. Some of them may
    last until its answer has left, and a client that reads no answers keeps them for as long as it likes. So these are
    shared by peer (`AnswerShares`): a call whose peer has its share waits for that peer's other calls, and keeps no
    other peer waiting meanwhile.

    Some bytes may be held for longer than a call. A call waits for others to end, but never for what is held: it is
    refused if it cannot fit beside that. While it waits, no more is held than leaves it room.

    Args:
        calls_count: How many calls may be under way at once.
        budget_bytes: What they may take, all together.
        waiting_count: How many more may wait; the next is refused at once.
        reserved_count: How many of those are for peers of which no call waits; and the same part of
            `waiting_bytes`.
        waiting_bytes: What those who wait may have brought all together, beside the budget; None for a quarter of it.
        memory: What the bytes are of, for errors.
        make_room: Called for a call that cannot fit beside what is held, in the call's thread, with the bytes that it
            lacks and the call. It may `release` some.
    """

    _POLL_PERIOD_S = 0.5
    """How often a call that waits to go on looks whether it is still wanted."""

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
        self._leaving_bytes = 0  # of calls that are computed, and whose answers have not left
        self._queue: deque[Ticket] = deque()
        self._passed_on: deque[Ticket] = deque()  # have their bytes, and wait for a place
        self._turned_s = 0.0  # when the last turn of those began or ended, on the monotonic clock
        self._lock = threading.Lock()

    def admit(
        self,
        footprint_bytes: int,
        call: CallContext,
        *,
        lasting_bytes: int = 0,
        brought_bytes: int = 0,
    ) -> AbstractContextManager[None]:
        """Hold a place and `footprint_bytes` for the block, after waiting for them.

        Args:
            lasting_bytes: How many of them the call keeps after the block, until its end (`Call.at_end`); if the
                block raises, none.
            brought_bytes: How many of them it holds already while it waits.

        Raises:
            ExhaustedError: It would never fit.
            UnavailableError: Too many calls wait already, or too large ones, or what is held leaves no room for it.
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
        """Take a place and bytes, to be given back by `leave`. Otherwise as `admitted`."""
        peer = call.peer_key
        with self._lock:
            if (
                not self._queue
                and not self._passed_on
                and self._free_places > 0
                and self._free_bytes >= footprint_bytes
                and (not lasting_bytes or self._shares.has_room(peer, lasting_bytes))
            ):
                self._free_places -= 1
                self._free_bytes -= footprint_bytes
                if lasting_bytes:
                    self._shares.take(peer, lasting_bytes)
                return
        changed = threading.Condition(self._lock)
        until_s = time.monotonic() + _PATIENCE_S
        ticket = Ticket(footprint_bytes, lasting_bytes, brought_bytes, peer, until_s, changed)
        with call.ledger.measure(Stage.QUEUE):
            self._wait(ticket, call)

    def check_fits(self, footprint_bytes: int) -> None:
        """Return if a call with such a footprint can ever be admitted. Raises ExhaustedError if not."""
        if footprint_bytes > self._budget_bytes:
            raise ExhaustedError(
                f"the call needs {footprint_bytes} bytes of {self._memory}, of which calls may "
                f"take {self._budget_bytes}: send fewer samples at a time"
            )

    def leave(self, footprint_bytes: int, lasting_bytes: int = 0) -> None:
        """Give back what `enter` took, but for the bytes that last: these are given back by `end`."""
        with self._lock:
            self._free_places += 1
            self._free_bytes += footprint_bytes - lasting_bytes
            self._leaving_bytes += lasting_bytes
            if self._queue or self._passed_on:
                self._wake_first()

    def end(self, lasting_bytes: int, peer: str) -> None:
        """Give back what lasted."""
        with self._lock:
            self._leaving_bytes -= lasting_bytes
            if lasting_bytes:
                self._shares.give_back(peer, lasting_bytes)
            self._free_bytes += lasting_bytes
            if self._queue or self._passed_on:
                self._wake_first()

    def yield_turn(self, call: CallContext) -> None:
        """Let a call that waits have the place of one that runs; return once that has a place again.

        It keeps its bytes. If no call waits for a place, nothing happens.

        Raises:
            CallCancelledError, DeadlineError: The call has ended. It has its place all the same, to be given back.
        """
        if not self._queue and not self._passed_on:
            return
        with self._lock, call.ledger.measure(Stage.QUEUE):
            ticket = Ticket(0, 0, 0, call.peer_key, 0.0, threading.Condition(self._lock))
            self._passed_on.append(ticket)
            self._free_places += 1
            self._turned_s = time.monotonic()
            self._wake_first()
            try:
                while not self._may_start(ticket):
                    remaining_s = call.remaining_s()
                    is_pressed = remaining_s is not None and remaining_s < self._POLL_PERIOD_S
                    ticket.changed.wait(remaining_s if is_pressed else self._POLL_PERIOD_S)
                    call.check()
                    self._wake_first()  # which may be another by now
            finally:
                self._passed_on.remove(ticket)
                self._free_places -= 1
                self._turned_s = time.monotonic()
                self._wake_first()

    def reserve(self, size_bytes: int) -> None:
        """Take bytes until they are released, at once or not at all.

        Raises:
            ExhaustedError: So many are not free now, or a call that waits would not fit beside them.
        """
        with self._lock:
            spare_bytes = self._unreserved_bytes - max(
                (ticket.footprint_bytes for ticket in self._queue), default=0
            )
            free_bytes = max(min(self._free_bytes, spare_bytes), 0)
            if size_bytes > free_bytes:
                raise ExhaustedError(
                    f"{size_bytes} bytes of {self._memory} cannot be held: beside calls and what is "
                    f"held already, {free_bytes} of {self._budget_bytes} are free"
                )
            self._free_bytes -= size_bytes
            self._reserved_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """Give back bytes that were held."""
        with self._lock:
            self._free_bytes += size_bytes
            self._reserved_bytes -= size_bytes
            self._wake_first()

    @property
    def load(self) -> Load:
        """What runs, what waits and what is held now."""
        with self._lock:
            return Load(
                running_count=self._calls_count - self._free_places,
                waiting_count=len(self._queue) + len(self._passed_on),
                used_bytes=self._unreserved_bytes - self._free_bytes,
                reserved_bytes=self._reserved_bytes,
            )

    @property
    def taken_bytes(self) -> int:
        """What calls take and what is held, together, now."""
        return self._budget_bytes - self._free_bytes

    @property
    def _unreserved_bytes(self) -> int:
        """What calls may take, all together, as long as what is held stays."""
        return self._budget_bytes - self._reserved_bytes

    def _wait(self, ticket: Ticket, call: CallContext) -> None:
        self.check_fits(ticket.footprint_bytes)
        with self._lock:
            missing_bytes = ticket.footprint_bytes - self._unreserved_bytes
        if missing_bytes > 0:
            self._make_room(missing_bytes, call)

        def wake() -> None:
            self._wake(ticket)

        call.on_cancel(wake)
        with self._lock:
            self._check_unreserved_room(ticket.footprint_bytes)
            if self._queue or not self._has_room(ticket.footprint_bytes):
                self._limits.check(ticket, self._queue)
            self._queue.append(ticket)
        try:
            while not self._start_or_wait(ticket, call):
                pass
        finally:
            call.remove_on_cancel(wake)  # a call of many slices may wait for each of them
            with self._lock:
                self._queue.remove(ticket)
                self._wake_first()

    def _start_or_wait(self, ticket: Ticket, call: CallContext) -> bool:
        """Start a call if it may, and return whether it has; if not, after a wait for what may let it."""
        with self._lock:
            if self._may_start(ticket):
                self._take(ticket.footprint_bytes, ticket.peer, ticket.lasting_bytes)
                return True
            call.check()  # with the lock held: who ends it from now on wakes it
            ticket.changed.wait(longest_wait_s(ticket, call))
            self._wake_first()  # which may be another by now
            return False

    def _check_unreserved_room(self, footprint_bytes: int) -> None:
        if footprint_bytes > self._unreserved_bytes:
            raise UnavailableError(
                f"the call needs {footprint_bytes} bytes of {self._memory}, of which tensors that "
                f"stay hold {self._reserved_bytes} now, and calls may take {self._budget_bytes} less that",
                retry_after_s=RETRY_AFTER_S,
            )

    def _first(self) -> Ticket | None:
        """Return the first in line, without those that wait for answers that may never leave; None if there is none."""
        for ticket in self._queue:
            lasting_bytes = ticket.lasting_bytes
            is_within_share = not lasting_bytes or self._shares.has_room(ticket.peer, lasting_bytes)
            fits = ticket.footprint_bytes <= self._unreserved_bytes - self._leaving_bytes
            if is_within_share and (fits or time.monotonic() < ticket.patient_until_s):
                return ticket
        return None

    def _may_start(self, ticket: Ticket) -> bool:
        return self._next() is ticket

    def _next(self) -> Ticket | None:
        """Return the call that may have a place now; None if none may."""
        if self._free_places <= 0:
            return None
        starts = self._first() if self._queue else None
        if starts is not None and not self._has_room(starts.footprint_bytes):
            starts = None
        if not self._passed_on or (starts is not None and not self._is_resume_due()):
            return starts
        return self._passed_on[0]

    def _is_resume_due(self) -> bool:
        """Return whether a turn may begin while others wait to start: turns so far apart take half of the places."""
        return time.monotonic() >= self._turned_s + TURN_S / self._calls_count

    def _has_room(self, footprint_bytes: int) -> bool:
        return self._free_places > 0 and self._free_bytes >= footprint_bytes

    def _take(self, footprint_bytes: int, peer: str, lasting_bytes: int) -> None:
        self._free_places -= 1
        self._free_bytes -= footprint_bytes
        if lasting_bytes:
            self._shares.take(peer, lasting_bytes)

    def _wake_first(self) -> None:
        """Let the next call see whether it may start. To wake all that wait would take long, where they are many."""
        following = self._next()
        if following is not None:
            following.changed.notify()

    def _wake(self, ticket: Ticket) -> None:
        with self._lock:
            ticket.changed.notify()


class _AdmissionScope(AbstractContextManager[None]):
    """A call's place, for the length of a block. See `Admission.admitted`."""

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


class PairedAdmission(AbstractContextManager[None]):
    """A call's place in two admissions, one taken after the other: in the same order by all calls."""

    def __init__(
        self, first: AbstractContextManager[None], second: AbstractContextManager[None]
    ) -> None:
        self._first = first
        self._second = second

    def __enter__(self) -> None:
        self._first.__enter__()
        try:
            self._second.__enter__()
        except BaseException as error:
            self._first.__exit__(type(error), error, error.__traceback__)
            raise

    def __exit__(self, *error: Any) -> None:
        self._second.__exit__(*error)
        self._first.__exit__(*error)

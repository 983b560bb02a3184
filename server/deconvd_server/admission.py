"""Who may start now, who waits, and who is told to come back later."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from deconvd.errors import ExhaustedError, UnavailableError
from deconvd_server.call import Call
from deconvd_server.device import TURN_S
from deconvd_server.ledger import Stage

__all__ = ["Admission", "Load"]


@dataclass(frozen=True, slots=True)
class Load:
    """How many calls run and wait, what those that run take, and what is held beside them."""

    running_count: int
    waiting_count: int
    used_bytes: int
    held_bytes: int = 0


class Admission:
    """Lets calls start in the order they came, while places and bytes last.

    A call that takes long passes its place on after each turn (`pass_on`). While both calls that are to start and
    calls that are to go on wait, each have half of the time: neither keeps the other waiting.

    Some of the bytes may be held for longer than a call. A call waits for others to end, but never
    for what is held: it is refused if it cannot fit beside that, and while it waits no more is held
    than leaves it room.

    Args:
        calls_count: How many calls may be under way at once.
        budget_bytes: What they may take, all together.
        waiting_count: How many more may wait; the next is refused at once.
        memory: What the bytes are of, for errors.
        make_room: Called, in its thread, for a call that cannot fit beside what is held, with the
            bytes that it lacks and the call: may `release` some.
    """

    _LOOK_S = 0.5
    """How often a call that waits to go on looks whether it is still wanted."""

    RETRY_AFTER_S = 0.5
    """What a refused caller is told: about the time that a queue of small calls takes to shrink."""

    def __init__(
        self,
        calls_count: int,
        budget_bytes: int,
        waiting_count: int,
        *,
        memory: str = "the device's memory",
        make_room: Callable[[int, Call], None] = lambda *_: None,
    ) -> None:
        self._memory = memory
        self._make_room = make_room
        self._calls_count = calls_count
        self._free_places = calls_count
        self._budget_bytes = budget_bytes
        self._free_bytes = budget_bytes
        self._held_bytes = 0
        self._waiting_count = waiting_count
        self._line: deque[_Ticket] = deque()
        self._passed_on: deque[_Ticket] = deque()  # have their bytes, and wait for a place
        self._turned_s = 0.0  # when the last turn of those began or ended, on the monotonic clock
        self._lock = threading.Lock()

    def admitted(self, footprint_bytes: int, call: Call) -> AbstractContextManager[None]:
        """Hold a place and `footprint_bytes` for the block, after waiting for them.

        Raises:
            ExhaustedError: It would never fit.
            UnavailableError: Too many calls wait already, or what is held leaves no room for it.
            CallCancelledError, DeadlineError: The call ended while it waited.
        """
        return _Admitted(self, footprint_bytes, call)

    def enter(self, footprint_bytes: int, call: Call) -> None:
        """Take a place and bytes, to be given back by `leave`. Otherwise as `admitted`."""
        with self._lock:
            if not self._line and not self._passed_on and self._has_room(footprint_bytes):
                self._take(footprint_bytes)
                return
        with call.ledger.timing(Stage.QUEUE):
            self._wait(footprint_bytes, call)

    def check_fits(self, footprint_bytes: int) -> None:
        """Return if a call with such a footprint can ever be admitted. Raises ExhaustedError if not."""
        if footprint_bytes > self._budget_bytes:
            raise ExhaustedError(
                f"the call needs {footprint_bytes} bytes of {self._memory}, of which calls may "
                f"take {self._budget_bytes}: send fewer samples at a time"
            )

    def leave(self, footprint_bytes: int) -> None:
        """Give back what `enter` took."""
        with self._lock:
            self._free_places += 1
            self._free_bytes += footprint_bytes
            self._wake_first()

    def pass_on(self, call: Call) -> None:
        """Let a call that waits have the place of one that runs; return once that has a place again.

        It keeps its bytes. If no call waits for a place, nothing happens.

        Raises:
            CallCancelledError, DeadlineError: The call has ended. It has its place all the same, to be given back.
        """
        if not self._line and not self._passed_on:
            return
        with self._lock, call.ledger.timing(Stage.QUEUE):
            ticket = _Ticket(0, threading.Condition(self._lock))
            self._passed_on.append(ticket)
            self._free_places += 1
            self._turned_s = time.monotonic()
            self._wake_first()
            try:
                while not self._may_start(ticket):
                    remaining_s = call.remaining_s()
                    is_pressed = remaining_s is not None and remaining_s < self._LOOK_S
                    ticket.changed.wait(remaining_s if is_pressed else self._LOOK_S)
                    call.check()
                    self._wake_other(ticket)
            finally:
                self._passed_on.remove(ticket)
                self._take(0)
                self._turned_s = time.monotonic()
                self._wake_first()

    def hold(self, size_bytes: int) -> None:
        """Take bytes until they are released, at once or not at all.

        Raises:
            ExhaustedError: So many are not free now, or a call that waits would not fit beside them.
        """
        with self._lock:
            spare_bytes = self._beside_held_bytes - max(
                (ticket.footprint_bytes for ticket in self._line), default=0
            )
            free_bytes = max(min(self._free_bytes, spare_bytes), 0)
            if size_bytes > free_bytes:
                raise ExhaustedError(
                    f"{size_bytes} bytes of {self._memory} cannot be held: beside calls and what is "
                    f"held already, {free_bytes} of {self._budget_bytes} are free"
                )
            self._free_bytes -= size_bytes
            self._held_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """Give back bytes that were held."""
        with self._lock:
            self._free_bytes += size_bytes
            self._held_bytes -= size_bytes
            self._wake_first()

    @property
    def load(self) -> Load:
        """What runs, what waits and what is held now."""
        with self._lock:
            return Load(
                running_count=self._calls_count - self._free_places,
                waiting_count=len(self._line) + len(self._passed_on),
                used_bytes=self._beside_held_bytes - self._free_bytes,
                held_bytes=self._held_bytes,
            )

    @property
    def _beside_held_bytes(self) -> int:
        """What calls may take, all together, as long as what is held stays."""
        return self._budget_bytes - self._held_bytes

    def _wait(self, footprint_bytes: int, call: Call) -> None:
        self.check_fits(footprint_bytes)
        with self._lock:
            missing_bytes = footprint_bytes - self._beside_held_bytes
        if missing_bytes > 0:
            self._make_room(missing_bytes, call)
        ticket = _Ticket(footprint_bytes, threading.Condition(self._lock))

        def wake() -> None:
            self._wake(ticket)

        call.on_cancel(wake)
        with self._lock:
            self._check_room_beside_held(footprint_bytes)
            self._line.append(ticket)
            try:
                if not self._may_start(ticket):
                    self._check_room_to_wait()
                while not self._may_start(ticket):
                    ticket.changed.wait(_wait_s(call))
                    call.check()
                    self._wake_other(ticket)
                self._take(footprint_bytes)
            finally:
                self._line.remove(ticket)
                self._wake_first()
                call.forget(wake)  # a call of many slices may wait for each of them

    def _check_room_beside_held(self, footprint_bytes: int) -> None:
        if footprint_bytes > self._beside_held_bytes:
            raise UnavailableError(
                f"the call needs {footprint_bytes} bytes of {self._memory}, of which tensors that "
                f"stay hold {self._held_bytes} now, and calls may take {self._budget_bytes} less that",
                retry_after_s=self.RETRY_AFTER_S,
            )

    def _check_room_to_wait(self) -> None:
        others_count = len(self._line) - 1
        if others_count >= self._waiting_count:
            raise UnavailableError(
                f"the server is full: {others_count} calls wait already",
                retry_after_s=self.RETRY_AFTER_S,
            )

    def _may_start(self, ticket: _Ticket) -> bool:
        return self._next_ticket() is ticket

    def _next_ticket(self) -> _Ticket | None:
        """Return whose turn it is to have a place; None if nobody can have one."""
        if self._free_places <= 0:
            return None
        starts = self._line[0] if self._line else None
        if starts is not None and not self._has_room(starts.footprint_bytes):
            starts = None
        if not self._passed_on or (starts is not None and not self._is_time_to_go_on()):
            return starts
        return self._passed_on[0]

    def _is_time_to_go_on(self) -> bool:
        """Return whether a turn may begin while others wait to start: turns so far apart take half of the places."""
        return time.monotonic() >= self._turned_s + TURN_S / self._calls_count

    def _has_room(self, footprint_bytes: int) -> bool:
        return self._free_places > 0 and self._free_bytes >= footprint_bytes

    def _take(self, footprint_bytes: int) -> None:
        self._free_places -= 1
        self._free_bytes -= footprint_bytes

    def _wake_first(self) -> None:
        """Let the next see that it may start: to wake all who wait would take long, where they are many."""
        ticket = self._next_ticket()
        if ticket is not None:
            ticket.changed.notify()

    def _wake_other(self, ticket: _Ticket) -> None:
        """Let the next see that it may start, if that is another by now: whose turn it is depends on the time."""
        if not self._may_start(ticket):
            self._wake_first()

    def _wake(self, ticket: _Ticket) -> None:
        with self._lock:
            ticket.changed.notify()


class _Admitted(AbstractContextManager[None]):
    """A call's place, for the length of a block. See `Admission.admitted`."""

    __slots__ = ("_admission", "_call", "_footprint_bytes")

    def __init__(self, admission: Admission, footprint_bytes: int, call: Call) -> None:
        self._admission = admission
        self._footprint_bytes = footprint_bytes
        self._call = call

    def __enter__(self) -> None:
        self._admission.enter(self._footprint_bytes, self._call)

    def __exit__(self, *_: object) -> None:
        self._admission.leave(self._footprint_bytes)


@dataclass(frozen=True, slots=True, eq=False)
class _Ticket:
    """A call in the line.

    Attributes:
        changed: Notified when it is first and may start, or when its caller has gone.
    """

    footprint_bytes: int
    changed: threading.Condition


def _wait_s(call: Call) -> float | None:
    remaining_s = call.remaining_s()
    # gRPC gives a call without a deadline some 292 billion years, more than a lock can wait
    return None if remaining_s is None else min(remaining_s, threading.TIMEOUT_MAX)

"""Who may start now, who waits, and who is told to come back later."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from deconvd.errors import ExhaustedError, UnavailableError
from deconvd_server.call import Call
from deconvd_server.ledger import Stage

__all__ = ["Admission", "Load"]


@dataclass(frozen=True, slots=True)
class Load:
    """How many calls run and wait, and what those that run take."""

    running_count: int
    waiting_count: int
    used_bytes: int


class Admission:
    """Lets calls start in the order they came, while places and bytes last.

    Args:
        calls_count: How many calls may be under way at once.
        budget_bytes: What they may take, all together.
        waiting_count: How many more may wait; the next is refused at once.
        memory: What the bytes are of, for errors.
    """

    RETRY_AFTER_S = 0.5
    """What a refused caller is told: about the time that a queue of small calls takes to shrink."""

    def __init__(
        self,
        calls_count: int,
        budget_bytes: int,
        waiting_count: int,
        *,
        memory: str = "the device's memory",
    ) -> None:
        self._memory = memory
        self._calls_count = calls_count
        self._free_places = calls_count
        self._budget_bytes = budget_bytes
        self._free_bytes = budget_bytes
        self._waiting_count = waiting_count
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def admitted(self, footprint_bytes: int, call: Call) -> Iterator[None]:
        """Hold a place and `footprint_bytes` for the block, after waiting for them.

        Raises:
            ExhaustedError: It would never fit.
            UnavailableError: Too many calls wait already.
            CallCancelledError, DeadlineError: The call ended while it waited.
        """
        with call.ledger.timing(Stage.QUEUE):
            self._enter(footprint_bytes, call)
        try:
            yield
        finally:
            self._leave(footprint_bytes)

    @property
    def load(self) -> Load:
        """What runs and what waits now."""
        with self._changed:
            return Load(
                running_count=self._calls_count - self._free_places,
                waiting_count=len(self._line),
                used_bytes=self._budget_bytes - self._free_bytes,
            )

    def _enter(self, footprint_bytes: int, call: Call) -> None:
        if footprint_bytes > self._budget_bytes:
            raise ExhaustedError(
                f"the call needs {footprint_bytes} bytes of {self._memory}, of which calls may "
                f"take {self._budget_bytes}: send fewer samples at a time"
            )
        with self._changed:
            if not self._line and self._has_room(footprint_bytes):
                self._take(footprint_bytes)
                return
        call.on_cancel(self._wake)
        ticket = object()
        with self._changed:
            self._line.append(ticket)
            try:
                if not self._may_start(ticket, footprint_bytes):
                    self._check_room_to_wait()
                while not self._may_start(ticket, footprint_bytes):
                    self._changed.wait(_wait_s(call))
                    call.check()
                self._take(footprint_bytes)
            finally:
                self._line.remove(ticket)
                self._changed.notify_all()

    def _check_room_to_wait(self) -> None:
        others_count = len(self._line) - 1
        if others_count >= self._waiting_count:
            raise UnavailableError(
                f"the server is full: {others_count} calls wait already",
                retry_after_s=self.RETRY_AFTER_S,
            )

    def _may_start(self, ticket: object, footprint_bytes: int) -> bool:
        return self._line[0] is ticket and self._has_room(footprint_bytes)

    def _has_room(self, footprint_bytes: int) -> bool:
        return self._free_places > 0 and self._free_bytes >= footprint_bytes

    def _take(self, footprint_bytes: int) -> None:
        self._free_places -= 1
        self._free_bytes -= footprint_bytes

    def _leave(self, footprint_bytes: int) -> None:
        with self._changed:
            self._free_places += 1
            self._free_bytes += footprint_bytes
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _wait_s(call: Call) -> float | None:
    remaining_s = call.remaining_s()
    # gRPC gives a call without a deadline some 292 billion years, more than a lock can wait
    return None if remaining_s is None else min(remaining_s, threading.TIMEOUT_MAX)

"""One caller's claim on the server."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from deconvd.errors import CallCancelledError, DeadlineError, DeconvdError
from deconvd_server.call.ledger import Ledger

__all__ = ["STALL_LIMIT_S", "CallContext", "CallerGoneError", "ClientWait", "ClientWaitState"]

STALL_LIMIT_S: Final = 30.0
"""How long a call may wait for its client to send or to take anything.

A switch or a wireless link that restarts is gone for less. Others who wait for the call's place wait for longer, as
clients' timeouts are a minute by default.
"""

_LONGEST_S: Final = 365 * 24 * 3600.0
"""A year. Clients may name deadlines that clocks and locks do not reach: 2^64 - 1 microseconds, 292 billion years."""


class CallerGoneError(Exception):
    """The caller has gone, as its transport found out: nobody is there to be told what comes of the call."""


class ClientWait(Protocol):
    """What waits for a client, and says so.

    Attributes:
        blocked_since_s: Since when it has waited for the client to send or to take anything, on the monotonic clock;
            infinity while it does not wait.
    """

    blocked_since_s: float


class ClientWaitState:
    """Something that waits for a client, whose transport sets it. See `ClientWait`."""

    __slots__ = ("blocked_since_s",)

    def __init__(self) -> None:
        self.blocked_since_s = math.inf


_NO_WAIT: Final = ClientWaitState()


def _do_nothing() -> None:
    pass


class CallContext:
    """One caller's claim on the server: it ends at its deadline, or when the caller goes.

    Whoever works for a call asks `check` between steps, so that no work is done for nobody.

    Attributes:
        peer: Who calls, for the log.
        counted_by: The peer that it counts for, where peers share. See `deconvd_server.resources.peer_keys`.
        ledger: Where its time goes.
        tenant: On whose behalf it is, if it belongs to a session; None if not.
        waiting: Since when it waits for its client. The transport sets it for a call in parts; others never wait.
        hang_up: Breaks the client's connection or call, from any thread and without waiting: for a client that neither
            sends nor takes anything. The transport sets it; by default it does nothing.
        stop_error: What the server has stopped it with, which its caller is to be told; None if it has not.
        sendable_bytes: What the elements of its answer may have, all together, that its transport can send. The
            transport sets it; by default there is no limit.

    Args:
        timeout_s: Seconds until the deadline, which is a year away at most; None for no deadline.
    """

    def __init__(
        self, timeout_s: float | None = None, peer: str = "", counted_by: str = ""
    ) -> None:
        self.peer = peer
        self.peer_key = counted_by
        self.client_wait: ClientWait = _NO_WAIT
        self.close_stream: Callable[[], None] = _do_nothing
        self.stop_error: DeconvdError | None = None
        self.ledger = Ledger()
        self.tenant: object = None
        self.sendable_bytes = sys.maxsize
        self._deadline_s = (
            None if timeout_s is None else time.monotonic() + min(timeout_s, _LONGEST_S)
        )
        self._lock = threading.Lock()
        self.is_cancelled = False
        self._callbacks: list[Callable[[], None]] = []
        self._references_count = 1
        self._end_callbacks: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """Note that the caller has gone, and tell those who asked by `on_cancel`."""
        with self._lock:
            self.is_cancelled = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def stop(self, error: DeconvdError) -> None:
        """End it as `cancel` does, on the server's own account: its caller, who may be there, is told the error."""
        with self._lock:
            if self.is_cancelled:
                return
            self.stop_error = error
        self.cancel()

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the caller goes: at once if it has gone already."""
        with self._lock:
            if not self.is_cancelled:
                self._callbacks.append(callback)
                return
        callback()

    def remove_on_cancel(self, callback: Callable[[], None]) -> None:
        """Forget a callback that `on_cancel` was given."""
        with self._lock, suppress(ValueError):
            self._callbacks.remove(callback)

    def retain(self) -> None:
        """Let it end only after one more `end`: for a worker, which may outlast the call that it works for."""
        with self._lock:
            self._references_count += 1

    def end(self) -> None:
        """Let it end, unless another holds it: all that was counted for it is given back (`at_end`).

        The transport calls it once, whatever comes of the call, and once for each `hold`: when the last byte of the
        answer has left, or never will, and when a worker has returned.
        """
        callbacks: list[Callable[[], None]] = []
        with self._lock:
            self._references_count -= 1
            if not self._references_count:
                callbacks, self._end_callbacks = self._end_callbacks, callbacks
        for callback in callbacks:
            callback()

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call `callback` once it ends: at once if it has already."""
        with self._lock:
            if self._references_count > 0:
                self._end_callbacks.append(callback)
                return
        callback()

    def remaining_s(self) -> float | None:
        """Return the seconds until the deadline, 0 once it has passed; None if there is none."""
        if self._deadline_s is None:
            return None
        return max(self._deadline_s - time.monotonic(), 0.0)

    def check(self) -> None:
        """Return if the work is still wanted.

        Raises:
            CallCancelledError: The caller has gone.
            DeadlineError: The deadline has passed.
        """
        if self.is_cancelled:
            raise CallCancelledError("the caller gave the call up")
        if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
            raise DeadlineError("the call's deadline passed before its work was done")

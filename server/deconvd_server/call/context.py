"""The context of one call: its deadline, its cancellation, its ledger and its tenant."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from deconvd.errors import CallCancelledError, DeadlineError, DeconvdError
from deconvd.model.problem import Problem
from deconvd.wire.trace_context import (
    TRACEPARENT,
    TRACESTATE,
    is_traceparent,
    limit_tracestate,
    trace_id_of,
)
from deconvd_server.call.ledger import Ledger
from deconvd_server.log_text import printable

__all__ = ["STALL_LIMIT_S", "CallContext", "CallerGoneError", "ClientWait", "ClientWaitState"]

STALL_LIMIT_S: Final = 30.0
"""How long a call may wait for its client to send or to take anything.

It is longer than a switch or a wireless link takes to restart. It is shorter than the default timeout of clients, which
is a minute: calls that wait for this call's place still get it in time.
"""

_MAX_REQUEST_ID_LENGTH: Final = 128

_LONGEST_S: Final = 365 * 24 * 3600.0
"""A year. Clients may send longer timeouts than clocks and locks can represent: up to 2^64 - 1 microseconds."""


class CallerGoneError(Exception):
    """The transport has found that the caller has gone: nobody is left to get an answer or an error."""


class ClientWait(Protocol):
    """Tells since when a call has waited for its client."""

    @property
    def blocked_since_s(self) -> float:
        """The time since which it has waited for the client to send or to take anything, on the monotonic clock.

        Infinity while it does not wait. Any thread may read it.
        """


class ClientWaitState:
    """A `ClientWait` that the transport sets."""

    __slots__ = ("blocked_since_s",)

    def __init__(self) -> None:
        self.blocked_since_s = math.inf


_NO_WAIT: Final = ClientWaitState()


def _do_nothing() -> None:
    pass


class CallContext:
    """The context of one call. The call is wanted until its deadline, or until the caller goes.

    Code that works for a call asks `check` between steps, so that it does not work for nobody. Thread-safe.

    A call's end is something else than its cancellation: it comes when nothing uses the call's memory any more, and
    then everything that was counted for the call is given back (`on_end`).

    Attributes:
        peer: The caller's address, for the log.
        peer_key: The peer that the call counts for where peers share. See `deconvd_server.resources.peer_identity`.
        identity: The name that the caller has proved; empty if the server asks for none. See `deconvd_server.access`.
        client_wait: Since when the call has waited for its client. The transport sets it for a call in parts; other
            calls never wait.
        close_stream: Breaks the client's connection or stream, from any thread and without waiting: for a client that
            neither sends nor takes anything. The transport sets it; by default it does nothing.
        note_long: To be called before the call waits for others, or does what takes longer than a small call does: so
            its thread need not be waited for. Any number of times. The transport sets it; by default it does nothing.
        stop_error: The error with which the server has stopped the call, for its caller; None if it has not.
        ledger: Where the call's time goes.
        tenant: The tenant for whom the call is, if it belongs to a session; None if not.
        sendable_bytes: How many bytes the elements of the answer may have for its transport to send them. The
            transport sets it; by default there is no limit.
        transport: How the call's tensors travel, for counts: ``unix``, ``tcp`` or ``grpc``, as the transport says, or
            ``shared_memory``.
        received_bytes: The size of the operands that have come so far: what is sent, or written into shared memory.
            Only the thread that serves the call sets it, as the next one.
        sent_bytes: The size of the results that have been made so far to be sent, or to be read from shared memory.
        request_id: The name of the call in logs and errors, which the client may set; empty if it has none.
        trace_headers: The caller's span, by the names of W3C Trace Context; empty if it has named none.
        trace_id: The trace that the call belongs to, for the log; empty if there is none.
        problem: What the call computes, once its request is parsed; None if it computes nothing.
        is_small: Whether the call takes its thread longer than it takes the device: known once its request is parsed.
        waits: Whether the caller would rather wait than be refused.
        is_accepted: Whether a queue has let the call in: from then on it may wait, but is not refused for want of time.
        paused_s: For how long the call has let others have its place.
        paused_share_s: Its part of that time: see `deconvd_server.engine.place_clock`.
        is_cancelled: Whether the caller has gone, or the server has stopped the call. Only `cancel` sets it. An
            attribute, since a property would cost a call for each message of a stream.

    Args:
        timeout_s: Seconds until the deadline, which is set to a year at most; None for no deadline.
    """

    def __init__(
        self,
        timeout_s: float | None = None,
        peer: str = "",
        peer_key: str = "",
        identity: str = "",
        transport: str = "",
    ) -> None:
        self.peer = peer
        self.peer_key = peer_key
        self.identity = identity
        self.transport = transport
        self.received_bytes = 0
        self.sent_bytes = 0
        self.client_wait: ClientWait = _NO_WAIT
        self.close_stream: Callable[[], None] = _do_nothing
        self.note_long: Callable[[], None] = _do_nothing
        self.stop_error: DeconvdError | None = None
        self.ledger = Ledger()
        self.tenant: object = None
        self.request_id = ""
        self.trace_headers: dict[str, str] = {}
        self.trace_id = ""
        self.problem: Problem | None = None
        self.sendable_bytes = sys.maxsize
        self.is_small = False
        self.waits = False
        self.is_accepted = False
        self.paused_s = 0.0
        self.paused_share_s = 0.0
        self._deadline_s = (
            None if timeout_s is None else time.monotonic() + min(timeout_s, _LONGEST_S)
        )
        self._lock = threading.Lock()
        self.is_cancelled = False
        self._callbacks: list[Callable[[], None]] = []
        self._references_count = 1
        self._end_callbacks: list[Callable[[], None]] = []

    def set_request_id(self, text: str) -> None:
        """Set the name that the client gives the call. What a log cannot hold is escaped, and what is too long cut."""
        if text:
            self.request_id = printable(text[:_MAX_REQUEST_ID_LENGTH])[:_MAX_REQUEST_ID_LENGTH]

    def set_trace_context(self, traceparent: str, tracestate: str) -> None:
        """Set the caller's span. If it is not valid, nothing changes, as W3C Trace Context has it."""
        if is_traceparent(traceparent):
            self.trace_headers = {
                TRACEPARENT: traceparent,
                TRACESTATE: limit_tracestate(tracestate),
            }
            self.trace_id = trace_id_of(traceparent)

    def cancel(self) -> None:
        """Note that the caller has gone, and call the callbacks of `on_cancel`."""
        with self._lock:
            self.is_cancelled = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def stop(self, error: DeconvdError) -> None:
        """Cancel the call because the server must: the caller, who may still be there, gets the error."""
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
        """Remove a callback of `on_cancel`."""
        with self._lock, suppress(ValueError):
            self._callbacks.remove(callback)

    def retain(self) -> None:
        """Require one more `end` before the call ends: for a worker, which may go on when the transport is done."""
        with self._lock:
            self._references_count += 1

    def end(self) -> None:
        """Release the call. The last release ends it, and calls the callbacks of `on_end`.

        The transport calls this once for each call, when the last byte of the answer has left or never will. Each
        `retain` needs one more, when the worker has returned.
        """
        callbacks: list[Callable[[], None]] = []
        with self._lock:
            self._references_count -= 1
            if not self._references_count:
                callbacks, self._end_callbacks = self._end_callbacks, callbacks
        for callback in callbacks:
            callback()

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the call ends; at once if it has ended already."""
        with self._lock:
            if self._references_count > 0:
                self._end_callbacks.append(callback)
                return
        callback()

    def remaining_s(self) -> float | None:
        """Return the seconds until the deadline, 0 once it has passed; None if there is no deadline."""
        if self._deadline_s is None:
            return None
        return max(self._deadline_s - time.monotonic(), 0.0)

    def check(self) -> None:
        """Return if the call is still wanted.

        Raises:
            CallCancelledError: The caller has gone.
            DeadlineError: The deadline has passed.
        """
        if self.is_cancelled:
            raise CallCancelledError("the caller gave the call up")
        if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
            raise DeadlineError("the call's deadline passed before its work was done")

"""Direct calls: without gRPC, on lines that are kept for the next calls. See `deconvd.direct.protocol`."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Final, TypeVar

from deconvd.direct.busy_polling import BusyPolling
from deconvd.direct.connection_errors import ConnectionBrokenError, ConnectionTimeoutError
from deconvd.direct.events import Answer, CallFailure, CallHead, MethodCode
from deconvd.direct.frame_stream import FrameStream, report_progress
from deconvd.errors import CallCancelledError, DeadlineError, DeconvdError
from deconvd.host.adaptive_backoff import AdaptiveBackoff
from deconvd.host.forks import new_lock, register_fork_reset
from deconvd.wire.ledger import OVERLAP_ENTRY
from deconvd.wire.status import error_from_status
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.overlapped_copy import OverlappedCopy
from deconvd_client.calls.transport import (
    NotServedDirectlyError,
    OutcomeUnknownError,
    StreamAttempt,
)
from deconvd_client.calls.uninterrupted import call_uninterrupted, run_in_background
from deconvd_client.transports.backoff import Backoff
from deconvd_client.transports.direct.connectors import Connector, InfoFetcher
from deconvd_client.transports.direct.duplex_call import run_stream_attempt

__all__ = ["DirectTransport"]

_T = TypeVar("_T")

_CONNECT_TIMEOUT_S: Final = 10.0
"""How long a thread may take to open a line."""

_CONNECT_PATIENCE_S: Final = 0.1
"""How long calls wait for a line that is being opened before they go by gRPC."""

_POLL_LEAD_S: Final = 4e-4
_POLL_DURATION_S: Final = 8e-4
"""From so long before an answer usually comes, and for so long, a client that waits for it polls."""

_MAX_IDLE_CONNECTIONS: Final = 16
"""Lines that are kept for later calls."""

_METHODS: Final = {method.name: method for method in MethodCode}

_log = logging.getLogger(__name__)


class DirectTransport:
    """Carries calls directly, by lines of its own, one at a time on each. See `Transport`.

    Args:
        way: How a line is opened.
        ask: Asks the server what it is.
    """

    def __init__(self, way: Connector, ask: InfoFetcher) -> None:
        self._connector = way
        self._fetch_info = ask
        self._is_closed = False
        self._backoff = Backoff()
        self._polling = BusyPolling(_POLL_DURATION_S, lead_s=_POLL_LEAD_S)
        self._overlap_backoff = AdaptiveBackoff()
        self._lock = new_lock()  # never held while anything is sent, or waited for
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Have no lines yet, as in a forked child."""
        self._idle: list[FrameStream] = []
        # Those that calls have. A call that was broken off by an interrupt may not have said that it ended:
        # its line closes itself once nothing refers to it.
        self._busy: set[weakref.ref[FrameStream]] = set()
        self._is_connecting = False
        self._waiters: list[SimpleQueue[None]] = []  # for what the opener opens

    @property
    def may_connect(self) -> bool:
        """Whether calls may get a line: the server has let the last one be opened, or was asked long ago."""
        return not self._is_closed and not self._backoff.is_pending

    @property
    def may_carry(self) -> bool:
        """Whether there is a line for a call, or may be one."""
        return bool(self._idle) or self.may_connect

    def unary(
        self,
        method: str,
        request: bytes,
        deadline: Deadline,
        late_copy: OverlappedCopy | None = None,
    ) -> tuple[bytes, str]:
        """Return the response to a call of one message, and its ledger.

        Raises:
            NotServedDirectlyError: It is to be made in another way.
            DeconvdError: What the server raised.
            DeadlineError: There was no answer in time.
            CallCancelledError: `close` was called meanwhile.
        """
        if late_copy is not None and not self._overlap_backoff.is_due():
            late_copy.run()
        early = late_copy if late_copy is not None and not late_copy.is_done else None
        written_bytes = early.initial_bytes if early is not None else 0
        with self._pooled_connection(deadline) as lent:
            line, is_early = lent.connection, early is not None
            head = CallHead(_METHODS[method], lent.timeout_s, request, is_early, written_bytes)
            line.send(head)
            if early is not None:
                with suppress(_EarlyAnswerError):
                    early.run(partial(_report_progress, line))
            self._polling.wait(line, self._is_alone)
            answer = line.next_event()
            if isinstance(answer, CallFailure):
                raise error_from_status(answer.status)
        assert isinstance(answer, Answer), answer  # nothing else may come
        if is_early:
            # a server that computes on the host, or for others too, does not follow: then it costs both
            # ends more to speak of progress than it saves
            self._overlap_backoff.record_outcome(has_paid=OVERLAP_ENTRY in answer.ledger)
        return answer

    def stream(self, begin: Callable[[], StreamAttempt[_T]], deadline: Deadline) -> tuple[_T, str]:
        """Make a call of many parts; return what is made of the response, and the ledger.

        Raises:
            As `unary`, and what the conversation's functions raise.
        """
        with self._pooled_connection(deadline) as lent:
            return run_stream_attempt(lent.connection, begin(), lent.timeout_s)

    def close(self) -> None:
        """Close all lines. Calls under way end with CallCancelledError."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            busy = [line for known in self._busy if (line := known()) is not None]
        for line in busy:
            line.shutdown()
        for line in idle:
            line.close()

    def __str__(self) -> str:
        with self._lock:
            busy_count = sum(known() is not None for known in self._busy)
            count = busy_count + len(self._idle)
        if not count:
            return "no direct connection"
        busy = f" ({busy_count} busy)" if busy_count else ""
        return f"{count} direct connection{'s' if count > 1 else ''}{busy}"

    def _is_alone(self) -> bool:
        """Return whether no other thread has a call under way."""
        return len(self._busy) == 1

    def _pooled_connection(self, deadline: Deadline) -> _PooledConnection:
        """Lend a line to a block, and keep it if the block has left it in order."""
        line = self._acquire(deadline)
        timeout_s = deadline.remaining_s()
        line.set_deadline(timeout_s)
        return _PooledConnection(line, timeout_s, self._release)

    def _release(self, line: FrameStream, error: BaseException | None) -> None:
        """Take a line back. Raises what the calling block is to raise, if that is another error than its own."""
        self._return_to_pool(line, error)
        if isinstance(error, ConnectionTimeoutError):
            raise DeadlineError("the server did not answer in time") from None
        if isinstance(error, ConnectionBrokenError):
            if self._is_closed:
                raise CallCancelledError("the connection is closed") from None
            _log.debug("a direct line was lost: %s", error)
            raise OutcomeUnknownError from None

    def _acquire(self, deadline: Deadline) -> FrameStream:
        """Return a line for one call. Raises NotServedDirectlyError if there is none."""
        taken = self._acquire_idle()
        if taken is None and self.may_connect:
            is_quick = self._connector.is_address_known
            opened = call_uninterrupted(lambda: self._connect(deadline)) if is_quick else None
            if opened is not None:
                return self._add_connection(opened, is_taken=True)
            if not deadline.remaining_s():  # which says nothing of the server
                raise DeadlineError("the call's deadline passed while a line was opened")
            self._connect_in_background(deadline)
            taken = self._acquire_idle()
        if taken is None:
            raise NotServedDirectlyError
        return taken

    def _acquire_idle(self) -> FrameStream | None:
        """Return a line that is not in use, if there is one that the server has not closed."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                idle = self._idle.pop()
                self._note_busy(idle)
            if idle.is_quiet():
                return idle
            with self._lock:
                self._busy.discard(weakref.ref(idle))
            idle.close()

    def _note_busy(self, line: FrameStream) -> None:
        if self._busy:
            self._busy = {known for known in self._busy if known() is not None}
        self._busy.add(weakref.ref(line))

    def _return_to_pool(self, line: FrameStream, error: BaseException | None) -> None:
        with self._lock:
            self._busy.discard(weakref.ref(line))
            is_wanted = not self._is_closed and len(self._idle) < _MAX_IDLE_CONNECTIONS
            is_kept = is_wanted and line.protocol.is_idle
            if is_kept:
                self._idle.append(line)
        if is_kept:
            return
        if error is None or isinstance(error, (DeconvdError, ConnectionBrokenError)):
            line.close()
        else:
            # after an interrupt a thread may still be sending: the line closes itself once none refers to it
            line.shutdown()

    def _connect_in_background(self, deadline: Deadline) -> None:
        """Open one more line in a thread, and wait for it for a moment."""
        opened: SimpleQueue[None] = SimpleQueue()
        with self._lock:
            self._waiters.append(opened)
            if not self._is_connecting:
                run_in_background(self._connect_for_waiters)
        with suppress(Empty):
            opened.get(timeout=min(_CONNECT_PATIENCE_S, deadline.remaining_s()))

    def _connect_for_waiters(self) -> None:
        with self._lock:
            if self._is_connecting:
                return  # another thread was asked at the same time
            self._is_connecting = True
        line = self._connect(Deadline(_CONNECT_TIMEOUT_S))
        with suppress(NotServedDirectlyError):  # the calls go by gRPC
            self._add_connection(line)
        with self._lock:
            self._is_connecting = False
            waiting, self._waiters = self._waiters, []
        for opened in waiting:
            opened.put(None)

    def _connect(self, deadline: Deadline) -> FrameStream | None:
        """Return a new line; None if the server opens none, whatever the reason."""
        try:
            return self._connector.connect(self._fetch_info, deadline.remaining_s())
        except Exception as error:  # noqa: BLE001 - gRPC serves the call, whatever the reason
            _log.debug("no direct calls: %s", error)
            return None

    def _add_connection(self, opened: FrameStream | None, *, is_taken: bool = False) -> FrameStream:
        """Keep a new line for a later call, or for that of this thread.

        Raises:
            NotServedDirectlyError: There is none. The server is left in peace for a while.
        """
        with self._lock:
            if opened is None:
                self._backoff.note_failure()
            elif not self._is_closed:
                self._backoff.note_success()
                if is_taken:
                    self._note_busy(opened)
                else:
                    self._idle.append(opened)
                return opened
        if opened is not None:
            opened.close()
        raise NotServedDirectlyError


@dataclass(slots=True)
class _PooledConnection(AbstractContextManager["_PooledConnection"]):
    """A line that a call has to itself, for the length of a block.

    Attributes:
        timeout_s: How long the call may take from now on.
        on_end: Called at the block's end with the line and the error that the block has raised, if any.
    """

    connection: FrameStream
    timeout_s: float
    release: Callable[[FrameStream, BaseException | None], None]

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release(self.connection, exc)


class _EarlyAnswerError(Exception):
    """The server has answered before it had all operands: it refuses the call, or does not need the rest."""


def _report_progress(line: FrameStream, size_bytes: int) -> None:
    """Say how far an early call's operands are written."""
    if not line.is_quiet():
        raise _EarlyAnswerError
    with suppress(ConnectionBrokenError):  # that is for who waits for the answer to find
        report_progress(line, size_bytes)

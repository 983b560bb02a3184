"""A pool of direct connections, which carry calls without gRPC. See `deconvd.direct.protocol`."""

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
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.ledger import OVERLAP_ENTRY
from deconvd.wire.status import error_from_status
from deconvd_client.calls.cancel_scope import CancelScope
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.overlapped_copy import OverlappedCopy
from deconvd_client.calls.patience import Patience
from deconvd_client.calls.tracing import current_call_span
from deconvd_client.calls.transport import (
    NotServedDirectlyError,
    OutcomeUnknownError,
    StreamAttempt,
)
from deconvd_client.calls.uninterrupted import call_uninterrupted, run_in_background
from deconvd_client.transports.backoff import Backoff
from deconvd_client.transports.direct.connectors import Connector, InfoFetcher
from deconvd_client.transports.direct.duplex_call import run_stream_attempt

__all__ = ["ConnectionGate", "DirectTransport"]

_T = TypeVar("_T")

_CONNECT_TIMEOUT_S: Final = 10.0
"""How long the background thread may take to open a connection."""

_CONNECT_PATIENCE_S: Final = 0.1
"""How long calls wait for a connection that is being opened, before they go by gRPC."""

_POLL_LEAD_S: Final = 4e-4
"""A client that waits for an answer begins to poll this long before the answer usually comes."""

_POLL_DURATION_S: Final = 8e-4
"""How long it polls."""

_MAX_IDLE_CONNECTIONS: Final = 64
"""How many connections are kept open for later calls: those of seven striped calls that end at about the same time."""

_METHODS: Final = {method.name: method for method in MethodCode}

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class ConnectionGate:
    """Whether connections to a server may be opened, whatever the way to it."""

    is_open: bool = True


class DirectTransport:
    """Carries calls by direct connections, one call at a time on each. See `Transport`. Thread-safe.

    Args:
        connector: Opens connections.
        fetch_info: Asks the server for its GetServerInfo response.
        patience: Bounds how long calls wait for connections.
        gate: Says whether connections may be opened; None if they always may.
    """

    def __init__(
        self,
        connector: Connector,
        fetch_info: InfoFetcher,
        patience: Patience | None = None,
        gate: ConnectionGate | None = None,
    ) -> None:
        self._connector = connector
        self._fetch_info = fetch_info
        self._patience = Patience() if patience is None else patience
        self._gate = ConnectionGate() if gate is None else gate
        self._is_closed = False
        self._backoff = Backoff()
        self._polling = BusyPolling(_POLL_DURATION_S, lead_s=_POLL_LEAD_S)
        self._overlap_backoff = AdaptiveBackoff()
        self._lock = new_lock()  # never held while anything is sent, or waited for
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Have no connections, as in a forked child."""
        self._idle: list[FrameStream] = []
        # The connections that calls use. A call that an interrupt broke off may not have said that it has ended:
        # so these are weak references, and the connection closes itself when nothing else refers to it.
        self._busy: set[weakref.ref[FrameStream]] = set()
        self._unwanted: set[weakref.ref[FrameStream]] = set()  # those to close after their calls
        self._is_connecting = False
        self._waiters: list[SimpleQueue[None]] = []  # of calls that wait for the background thread

    @property
    def may_connect(self) -> bool:
        """Whether a new connection may be tried: the last try succeeded, or was long ago."""
        return self._gate.is_open and not self._is_closed and not self._backoff.is_pending

    @property
    def may_carry(self) -> bool:
        """Whether there is a connection for a call, or one may be opened."""
        return bool(self._idle) or self.may_connect

    @property
    def has_connections(self) -> bool:
        """Whether there are connections, in use or not."""
        return self.connections_count > 0

    @property
    def connections_count(self) -> int:
        """How many connections there are, in use or not."""
        with self._lock:
            return len(self._idle) + sum(known() is not None for known in self._busy)

    def unary(
        self,
        method: str,
        request: bytes,
        deadline: Deadline,
        overlapped_copy: OverlappedCopy | None = None,
    ) -> tuple[bytes, str]:
        """Return the response to a call of one message, and its ledger.

        Raises:
            NotServedDirectlyError: Another transport must carry the call.
            DeconvdError: What the server raised.
            DeadlineError: There was no answer in time.
            CallCancelledError: `close` was called meanwhile.
        """
        if overlapped_copy is not None and not self._overlap_backoff.is_due():
            overlapped_copy.run()
        copy = None if overlapped_copy is None or overlapped_copy.is_done else overlapped_copy
        initial_bytes = 0 if copy is None else copy.initial_bytes
        with self.pooled_connection(deadline) as pooled:
            connection = pooled.connection
            connection.send(
                CallHead(
                    _METHODS[method], pooled.timeout_s, request, copy is not None, initial_bytes
                )
            )
            if copy is not None:
                with suppress(_EarlyAnswerError):
                    copy.run(partial(_report_progress, connection))
            self._polling.wait(connection, self._is_alone)
            answer = connection.next_event()
            if isinstance(answer, CallFailure):
                raise error_from_status(answer.status)
        assert isinstance(answer, Answer), answer  # the protocol lets nothing else come
        if copy is not None:
            # A server that computes on the host, or for others at the same time, does not follow the copy.
            # Then progress reports cost both ends more than they save.
            self._overlap_backoff.record_outcome(has_paid=OVERLAP_ENTRY in answer.ledger)
        return answer.message, answer.ledger

    def stream(self, begin: Callable[[], StreamAttempt[_T]], deadline: Deadline) -> tuple[_T, str]:
        """See `Transport`.

        Raises:
            As `unary`, and what the functions of the attempt raise.
        """
        with self.pooled_connection(deadline) as pooled:
            return run_stream_attempt(pooled.connection, begin(), pooled.timeout_s)

    def pooled_connection(self, deadline: Deadline) -> _PooledConnection:
        """Return a connection for the call in a block. Raises NotServedDirectlyError if there is none."""
        connection = self.acquire_idle()
        if connection is None:
            connection = self._open_for_call(deadline)
        timeout_s = deadline.remaining_s()
        connection.set_deadline(timeout_s)
        if deadline.scope is not None:
            deadline.scope.attach(connection.abort)
        if (span := current_call_span.get()) is not None:
            span.is_direct = True
        return _PooledConnection(connection, timeout_s, self._release, deadline.scope)

    def acquire_idle(self) -> FrameStream | None:
        """Return a connection that no call uses and that the server has not closed; None if there is none."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
                self._note_busy(connection)
            if connection.is_quiet():
                return connection
            with self._lock:
                self._busy.discard(weakref.ref(connection))
            connection.close()

    def open_idle(self) -> bool:
        """Open one more connection for later calls. Return whether there is one."""
        connection = self._connect(Deadline(_CONNECT_TIMEOUT_S))
        with suppress(NotServedDirectlyError):
            return connection is not None and bool(self._add_connection(connection))
        return False

    def take_back(self, connection: FrameStream, error: BaseException | None) -> None:
        """Take a connection back after a call: keep it for the next one, or close it.

        Args:
            error: What the call raised, if anything.
        """
        with self._lock:
            is_wanted = not self._is_closed and len(self._idle) < _MAX_IDLE_CONNECTIONS
            if self._unwanted:
                is_wanted &= weakref.ref(connection) not in self._unwanted
            if is_wanted and connection.protocol.is_idle:
                self._busy.discard(weakref.ref(connection))
                self._idle.append(connection)
                return
        self.discard(connection, error)

    def discard(self, connection: FrameStream, error: BaseException | None) -> None:
        """Close a connection after a call that raised `error`, if anything."""
        with self._lock:
            self._busy.discard(weakref.ref(connection))
            self._unwanted.discard(weakref.ref(connection))
        if error is None or isinstance(error, (DeconvdError, ConnectionBrokenError)):
            connection.close()
        else:
            # after an interrupt a thread may still be sending: the last reference to the connection closes it
            connection.abort()

    def close_idle(self) -> None:
        """Close the connections that no call uses, and the others after their calls. Later calls open others."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._unwanted = set(self._busy)
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Close all connections. Calls under way end with CallCancelledError."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            busy = [connection for known in self._busy if (connection := known()) is not None]
        for connection in busy:
            connection.abort()  # the call's own thread closes it: another may be using the descriptor
        for connection in idle:
            connection.close()

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

    def _open_for_call(self, deadline: Deadline) -> FrameStream:
        """Return a connection that was opened for a call. Raises NotServedDirectlyError if there is none."""
        if not self.may_connect:
            raise NotServedDirectlyError
        if (
            self._connector.is_address_known
        ):  # then it takes so little time that the call can do it itself
            opened = call_uninterrupted(lambda: self._connect(deadline), scope=deadline.scope)
            if opened is not None:
                return self._add_connection(opened, is_taken=True)
        if not deadline.remaining_s():  # which says nothing about the server: there is no back-off
            raise DeadlineError("the call's deadline passed while a direct connection was opened")
        self._connect_in_background(deadline)
        connection = self.acquire_idle()
        if connection is None:
            raise NotServedDirectlyError
        return connection

    def _note_busy(self, connection: FrameStream) -> None:
        if self._busy:
            self._busy = {known for known in self._busy if known() is not None}
        self._busy.add(weakref.ref(connection))

    def _release(
        self, connection: FrameStream, error: BaseException | None, scope: CancelScope | None
    ) -> None:
        """Take a connection back. An error of the connection becomes the error that the caller knows.

        Args:
            error: What the call's block raised, if anything.
            scope: Who could cancel the call.
        """
        if scope is not None:
            scope.detach(connection.abort)
        self.take_back(connection, error)
        if isinstance(error, ConnectionTimeoutError):
            raise DeadlineError("the server did not answer in time") from None
        if isinstance(error, ConnectionBrokenError):
            if self._is_closed:
                raise CallCancelledError("the connection is closed") from None
            if scope is not None and scope.is_cancelled:
                raise scope.make_error() from None
            _log.debug("a direct connection was lost: %s", error)
            raise OutcomeUnknownError from None

    def _connect_in_background(self, deadline: Deadline) -> None:
        """Have a thread open one more connection, and wait for it for a moment."""
        signal: SimpleQueue[None] = SimpleQueue()
        with self._lock:
            self._waiters.append(signal)
            if not self._is_connecting:
                run_in_background(self._connect_for_waiters)
        limit_s = min(_CONNECT_PATIENCE_S, self._patience.remaining_s())
        with suppress(Empty):
            signal.get(timeout=min(limit_s, deadline.remaining_s()))

    def _connect_for_waiters(self) -> None:
        with self._lock:
            if self._is_connecting:
                return  # two calls started a thread at the same time
            self._is_connecting = True
        connection = self._connect(Deadline(_CONNECT_TIMEOUT_S))
        with suppress(NotServedDirectlyError):  # the calls go by gRPC
            self._add_connection(connection)
        with self._lock:
            self._is_connecting = False
            waiters, self._waiters = self._waiters, []
        for signal in waiters:
            signal.put(None)

    def _connect(self, deadline: Deadline) -> FrameStream | None:
        """Return a new connection; None if none can be opened, whatever the reason."""
        try:
            return self._connector.connect(self._fetch_if_open, deadline.remaining_s())
        except Exception as error:  # noqa: BLE001 - gRPC serves the call, whatever the reason
            _log.debug("no direct calls: %s", error)
            return None

    def _fetch_if_open(self) -> pb.GetServerInfoResponse:
        info = self._fetch_info()
        if not self._gate.is_open:  # closed by whoever has seen the answer
            raise NotServedDirectlyError
        return info

    def _add_connection(
        self, connection: FrameStream | None, *, is_taken: bool = False
    ) -> FrameStream:
        """Add a new connection for later calls, or for the call of this thread.

        Args:
            connection: None if it could not be opened: then none is tried for a while.
            is_taken: Whether the call of this thread takes it.

        Raises:
            NotServedDirectlyError: There is no connection.
        """
        with self._lock:
            if connection is None:
                if self._gate.is_open:
                    self._backoff.note_failure()
            elif not self._is_closed:
                self._backoff.note_success()
                if is_taken:
                    self._note_busy(connection)
                else:
                    self._idle.append(connection)
                return connection
        if connection is not None:
            connection.close()
        raise NotServedDirectlyError


@dataclass(slots=True)
class _PooledConnection(AbstractContextManager["_PooledConnection"]):
    """A connection that a call has to itself for the length of a block.

    Attributes:
        connection: The connection. Its deadline is set.
        timeout_s: How long the call may take, from now on.
        release: Called at the end of the block with the connection, the error that the block raised, if any, and the
            scope.
        scope: Who can cancel the call. The connection is aborted then.
    """

    connection: FrameStream
    timeout_s: float
    release: Callable[[FrameStream, BaseException | None, CancelScope | None], None]
    scope: CancelScope | None

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release(self.connection, exc, self.scope)


class _EarlyAnswerError(Exception):
    """The server has answered before it had all operands: it refuses the call, or does not need the rest."""


def _report_progress(connection: FrameStream, size_bytes: int) -> None:
    """Report how many bytes of the operands of an overlapped call are written."""
    if not connection.is_quiet():
        raise _EarlyAnswerError
    with suppress(
        ConnectionBrokenError
    ):  # the thread that waits for the answer will find it broken
        report_progress(connection, size_bytes)

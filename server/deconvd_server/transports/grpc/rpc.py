"""One gRPC call, as the server has it: messages, its end, and who is told of them. It knows no method.

grpcio's servers, with threads or in an event loop, cannot serve calls that wait for their first message without a place
for each, cannot end a call on a client that does not read, or are ended by a path that is no UTF-8. So the server is
made here of what they are made of: completion queues and batches of operations.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

import grpc
from google.rpc import status_pb2
from grpc_status import rpc_status

from deconvd_server.transports.grpc.core import cygrpc

__all__ = ["CallLater", "Metadata", "Rpc"]

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]

CallLater: TypeAlias = Callable[[float, Callable[[], None]], None]

_NO_FLAGS: Final = 0
_LONGEST_S: Final = 365 * 24 * 3600.0
"""A deadline further away is none: gRPC has one in 292 billion years for a call without."""

_log = logging.getLogger(__name__)


class Rpc:
    """A call. Callbacks are called in gRPC's thread, and must be quick; everything else may be done in any thread.

    Attributes:
        path: Of its method.
        peer: Who calls, as gRPC tells it.
        later: Does something in gRPC's thread after so many seconds.
        on_close: Called once the caller has gone, or has all of the answer.
        is_closed: Whether that is so.
        has_all: Whether what serves it asks for no more messages. That sets it.
        is_idle: Whether it may well be without a message for long. What serves it sets it.
        is_receiving: Whether a message is awaited.
        asked_s: When it was last asked for one, or came, on the monotonic clock.
        on_done: Called once nothing of it is under way, and gRPC holds none of its messages any more: after `on_close`.

    Args:
        event: With it the call came.
        on_end: Called once nothing of it is under way.
    """

    def __init__(self, event: Any, later: CallLater, on_end: Callable[[Rpc], None]) -> None:
        self.path: str = event.call_details.method.decode(errors="replace")
        self.call_later = later
        self.on_close: Callable[[], None] = _do_nothing
        self.on_done: Callable[[], None] = _do_nothing
        self.is_closed = False
        self.has_all_requests = False
        self.is_idle = False
        self.is_receiving = False
        self.receive_began_s = time.monotonic()
        self._deadline_s: float = event.call_details.deadline
        self._call = event.call
        self._on_end = on_end
        self._lock = threading.Lock()
        self._pending_count = 0
        self._has_begun_to_answer = False
        self._is_over = False  # nothing more may be sent
        self._receive_batch: weakref.ref[_Batch] | None = None
        self.peer: str = self._call.peer().decode(errors="replace")
        self._start((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), _Batch(self, self._close))

    @property
    def has_ended(self) -> bool:
        """Whether nothing more may be sent."""
        return self._is_over

    @property
    def remaining_s(self) -> float | None:
        """Seconds until its deadline; None if it has none."""
        remaining_s = self._deadline_s - time.time()
        return max(remaining_s, 0.0) if remaining_s < _LONGEST_S else None

    def receive(self, then: Callable[[bytes | None], None]) -> None:
        """Call `then` with the next message; with None if there is no more, as after the call's end."""
        operations = (cygrpc.ReceiveMessageOperation(_NO_FLAGS),)
        batch = _Batch(self, partial(self._deliver, then))
        self._receive_batch = weakref.ref(batch)  # gRPC alone holds it
        self.is_receiving = True
        self.receive_began_s = time.monotonic()
        if not self._start(operations, batch):
            self.is_receiving = False
            then(None)

    def send(self, message: bytes, then: Callable[[], None]) -> None:
        """Send a message, and call `then` once it has left, or never will. The one before must have."""
        operations = (*self._initial_metadata(), cygrpc.SendMessageOperation(message, _NO_FLAGS))
        if not self._start(operations, _Batch(self, lambda _event: then())):
            then()

    def finish(self, metadata: Metadata, message: bytes | None = None) -> None:
        """End it well, with a last message. Once it has ended nothing is done."""
        message_operations = (
            () if message is None else (cygrpc.SendMessageOperation(message, _NO_FLAGS),)
        )
        self._end(metadata, cygrpc.StatusCode.ok, "", message_operations)

    def fail(self, failure: status_pb2.Status) -> None:
        """End it with a failure. Once it has ended nothing is done."""
        status = rpc_status.to_status(failure)
        self._end(status.trailing_metadata, status.code.value[0], status.details)

    def fail_with(self, code: grpc.StatusCode, details: str) -> None:
        """End it with a status. Once it has ended nothing is done."""
        self._end((), code.value[0], details)

    def cancel(self) -> None:
        """End it without a word, also on a client that does not read."""
        with self._lock:
            if self._call is not None:
                self._call.cancel()

    def drop_lost_receive(self) -> bool:
        """Return whether a message came that there was no memory for, and note that it is under way no more."""
        if self._receive_batch is None or self._receive_batch() is not None:
            return False
        self._receive_batch = None
        self.note_done()
        return True

    def _deliver(self, then: Callable[[bytes | None], None], event: Any) -> None:
        self._receive_batch = None
        self.is_receiving = False
        then(event.batch_operations[0].message())

    def _initial_metadata(self) -> tuple[Any, ...]:
        if self._has_begun_to_answer:
            return ()
        self._has_begun_to_answer = True
        return (cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS),)

    def _end(
        self, metadata: Metadata, code: int, details: str, messages: tuple[Any, ...] = ()
    ) -> None:
        status = cygrpc.SendStatusFromServerOperation(
            tuple(metadata), code, details.encode(), _NO_FLAGS
        )
        with self._lock:
            is_over, self._is_over = self._is_over, True
        if not is_over:
            batch = _Batch(self, _ignore)
            self._start((*self._initial_metadata(), *messages, status), batch, is_last=True)

    def _start(self, operations: tuple[Any, ...], batch: _Batch, *, is_last: bool = False) -> bool:
        """Start a batch, and return whether it was: none is once the call is over."""
        with self._lock:
            if self._call is None or (self._is_over and not is_last):
                return False
            is_begun: bool = self._call.start_server_batch(operations, batch) == cygrpc.CallError.ok
            self._pending_count += is_begun
        return is_begun

    def _close(self, _event: Any) -> None:
        with self._lock:
            self._is_over = self.is_closed = True
        self.on_close()

    def note_done(self) -> None:
        """Note that a batch is under way no more. After the last of them the call is given up."""
        with self._lock:
            self._pending_count -= 1
            is_end = not self._pending_count and self._is_over
            if is_end:
                self._call = None
        if is_end:
            self.on_done()
            self.on_close = self.on_done = _do_nothing  # who is told holds this call, too
            self._on_end(self)


class _Batch:
    """Operations under way: gRPC's thread calls it once they are done.

    Args:
        then: Is called with gRPC's event.
    """

    __slots__ = ("__weakref__", "_rpc", "_then")

    def __init__(self, rpc: Rpc, then: Callable[[Any], None]) -> None:
        self._rpc = rpc
        self._then = then

    def __call__(self, event: Any) -> None:
        try:
            self._then(event)
        except Exception:  # noqa: BLE001 - logged, and told as INTERNAL
            _log.exception("unforeseen error in gRPC's thread")
            self._rpc.fail_with(grpc.StatusCode.INTERNAL, "unforeseen error: see the server's log")
        finally:
            self._rpc.note_done()


def _ignore(_event: Any) -> None:
    pass


def _do_nothing() -> None:
    pass

"""One gRPC call as the server has it: its messages, its end, and who is told of them. It knows no method.

grpcio's own servers do not do: with threads or in an event loop, they need a place for each call that waits for its
first message, cannot end a call whose client does not read, and end by a path that is not UTF-8. So this server is made
of the same parts as theirs: completion queues, and batches of operations.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

import grpc
from google.rpc import status_pb2
from grpc_status import rpc_status

from deconvd.errors import UnauthenticatedError
from deconvd_server.access.authenticator import Caller
from deconvd_server.access.caller_proof import CallerProof
from deconvd_server.resources.peer_identity import peer_key_of_grpc
from deconvd_server.transports.grpc.core import cygrpc

__all__ = ["CallLater", "Metadata", "Rpc"]

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]

CallLater: TypeAlias = Callable[[float, Callable[[], None]], None]

_NO_FLAGS: Final = 0

_LONGEST_S: Final = 365 * 24 * 3600.0
"""A deadline further away counts as none: gRPC gives calls without a deadline one in 292 billion years."""

_log = logging.getLogger(__name__)


class Rpc:
    """One call. gRPC's thread calls the callbacks, which must be quick; any thread may do everything else.

    The call is over once its status has been sent or its client has gone; after that nothing more is sent. It is done
    once gRPC has also handed back every batch of operations, and with them the memory of its messages.

    Attributes:
        path: The path of its method.
        peer: The caller's address, in gRPC's form.
        metadata: What the caller has sent with the call.
        caller: Who the caller is.
        call_later: Calls a function in gRPC's thread after a number of seconds.
        on_close: Called once the caller has gone, or has received the whole answer.
        is_closed: Whether that has happened.
        has_all_requests: Whether its handler asks for no more messages. The handler sets it.
        is_idle: Whether it may be without a message for long, as a session may. The handler sets it.
        is_receiving: Whether a message is awaited.
        receive_began_s: When a message was last asked for, on the monotonic clock.
        has_received: Whether its first message has come, or the news that there is none.
        answered_s: When its status was handed to gRPC, on the monotonic clock; infinity before that.
        answer_bytes: The size of the last message then.
        on_done: Called once it is done, after `on_close`.

    Args:
        event: The event of the completion queue that brought the call.
        on_end: Called once it is done, after `on_done`.
    """

    def __init__(self, event: Any, call_later: CallLater, on_end: Callable[[Rpc], None]) -> None:
        self.path: str = event.call_details.method.decode(errors="replace")
        self.call_later = call_later
        self.on_close: Callable[[], None] = _do_nothing
        self.on_done: Callable[[], None] = _do_nothing
        self.is_closed = False
        self.has_all_requests = False
        self.is_idle = False
        self.is_receiving = False
        self.receive_began_s = time.monotonic()
        self.has_received = False
        self.answered_s = math.inf
        self.answer_bytes = 0
        self._deadline_s: float = event.call_details.deadline
        self._call = event.call
        self._on_end = on_end
        self._lock = threading.Lock()
        self._pending_count = 0  # batches that gRPC has not handed back
        self._has_begun_to_answer = False
        self._is_over = False
        self._receive_batch: weakref.ref[Callable[[Any], None]] | None = None
        self.metadata: Metadata = event.invocation_metadata
        self._proof: CallerProof | None = None
        self.peer: str = self._call.peer().decode(errors="replace")
        self.caller = Caller("", peer_key_of_grpc(self.peer))
        close = cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS)
        self._start((close,), partial(self._finish_batch, self._close, False))

    @property
    def has_ended(self) -> bool:
        """Whether nothing more may be sent."""
        return self._is_over

    @property
    def remaining_s(self) -> float | None:
        """Seconds until its deadline; None if it has none."""
        remaining_s = self._deadline_s - time.time()
        return max(remaining_s, 0.0) if remaining_s < _LONGEST_S else None

    def authenticate(self, proof: CallerProof) -> None:
        """Set the caller to the one that a proof proves. Raises UnauthenticatedError if it proves none."""
        self.caller = proof.identify()
        self._proof = proof

    def check_caller(self) -> None:
        """Return if the caller still is who it was. Raises UnauthenticatedError if its token was revoked, say."""
        if self._proof is not None and self._proof.identify() != self.caller:
            raise UnauthenticatedError("the token of the call belongs to somebody else by now")

    def receive(self, then: Callable[[bytes | None], object]) -> None:
        """Call `then` with the next message; with None if there are no more, or the call has ended."""
        batch = partial(self._finish_batch, then, True)
        # Weak: gRPC alone holds the batch. If memory runs out while gRPC hands it back, it is lost, and that is how
        # `drop_lost_receive` knows.
        self._receive_batch = weakref.ref(batch)
        self.is_receiving = True
        self.receive_began_s = time.monotonic()
        if not self._start((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), batch):
            self._receive_batch = None
            self.is_receiving = False
            then(None)

    def send(self, message: bytes, then: Callable[[], object]) -> None:
        """Send a message, and call `then` once it has left or never will. The message before must have left."""
        operations: tuple[Any, ...] = (cygrpc.SendMessageOperation(message, _NO_FLAGS),)
        if not self._has_begun_to_answer:
            operations = (*self._initial_metadata(), *operations)
        if not self._start(operations, partial(self._finish_batch, then, False)):
            then()

    def finish(self, metadata: Metadata, message: bytes | None = None) -> None:
        """End the call well, with a last message if there is one. Does nothing if it has ended."""
        messages = () if message is None else (cygrpc.SendMessageOperation(message, _NO_FLAGS),)
        size_bytes = 0 if message is None else len(message)
        self._end(metadata, cygrpc.StatusCode.ok, "", messages, size_bytes)

    def fail(self, failure: status_pb2.Status) -> None:
        """End the call with a failure. Does nothing if it has ended."""
        status = rpc_status.to_status(failure)
        self._end(status.trailing_metadata, status.code.value[0], status.details)

    def fail_with(self, code: grpc.StatusCode, details: str) -> None:
        """End the call with a status. Does nothing if it has ended."""
        self._end((), code.value[0], details)

    def cancel(self) -> None:
        """Break the call off without a status: this works for clients that do not read, too."""
        with self._lock:
            if self._call is not None:
                self._call.cancel()

    def drop_lost_receive(self) -> bool:
        """Return whether a message came that there was no memory for; if so, count its batch as handed back."""
        if self._receive_batch is None or self._receive_batch() is not None:
            return False
        self._receive_batch = None
        self._finish_batch(_do_nothing, False, None)
        return True

    def _initial_metadata(self) -> tuple[Any, ...]:
        if self._has_begun_to_answer:
            return ()
        self._has_begun_to_answer = True
        return (cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS),)

    def _end(
        self,
        metadata: Metadata,
        code: int,
        details: str,
        messages: tuple[Any, ...] = (),
        size_bytes: int = 0,
    ) -> None:
        status = cygrpc.SendStatusFromServerOperation(
            tuple(metadata), code, details.encode(), _NO_FLAGS
        )
        with self._lock:
            is_over, self._is_over = self._is_over, True
        if not is_over:
            self.answered_s, self.answer_bytes = time.monotonic(), size_bytes
            batch = partial(self._finish_batch, _do_nothing, False)
            self._start((*self._initial_metadata(), *messages, status), batch, is_last=True)

    def _start(
        self, operations: tuple[Any, ...], batch: Callable[[Any], None], *, is_last: bool = False
    ) -> bool:
        """Start a batch of operations, and return whether it has started: none does once the call is over."""
        with self._lock:
            if self._call is None or (self._is_over and not is_last):
                return False
            is_begun: bool = self._call.start_server_batch(operations, batch) == cygrpc.CallError.ok
            self._pending_count += is_begun
        return is_begun

    def _finish_batch(self, then: Callable[..., object], is_receive: bool, event: Any) -> None:
        """Take a batch back, in gRPC's thread: tell who waits for it, and notice whether the call is done.

        This is the whole way of each message in gRPC's thread, and so one function.
        """
        try:
            if is_receive:
                self._receive_batch = None
                self.is_receiving = False
                self.has_received = True
                then(event.batch_operations[0].message())
            else:
                then()
        except Exception:  # noqa: BLE001 - logged, and the client gets INTERNAL
            _log.exception("unforeseen error in gRPC's thread")
            self.fail_with(grpc.StatusCode.INTERNAL, "unforeseen error: see the server's log")
        finally:
            with self._lock:
                self._pending_count -= 1
                is_done = not self._pending_count and self._is_over
                if is_done:
                    self._call = None
            if is_done:
                self.on_done()
                # The callbacks refer to this call in turn: without the circle it is freed at once.
                self.on_close = self.on_done = _do_nothing
                self._on_end(self)

    def _close(self) -> None:
        with self._lock:
            self._is_over = self.is_closed = True
        self.on_close()


def _do_nothing() -> None:
    pass

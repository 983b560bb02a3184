"""One client's line for direct calls: it serves one call after the other. See `deconvd.direct.protocol`.

    IDLE --a call comes--> BUSY --answered--> IDLE
      |                      |
      `---told to end------- `---told to end, and answered--> ENDED

A line that breaks, or whose client goes, is ENDED at once, whatever it was.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from enum import Enum
from typing import Any, Final

from google.protobuf.message import Message
from google.rpc import status_pb2

from deconvd.direct.busy_polling import BusyPolling
from deconvd.direct.byte_stream import SocketStream
from deconvd.direct.connection_errors import (
    ConnectionBrokenError,
    ConnectionClosedError,
    MessageTooLargeError,
)
from deconvd.direct.events import (
    MAX_MESSAGE_BYTES,
    Answer,
    CallFailure,
    CallHead,
    EndOfStream,
    Hello,
    MethodCode,
    ProgressReport,
)
from deconvd.direct.frame_stream import FrameSource, FrameStream
from deconvd.direct.protocol import DirectProtocol, ProtocolState, Role
from deconvd.errors import ExhaustedError
from deconvd.wire.codec import encode
from deconvd.wire.stream_parts import PartReader
from deconvd_server.call.context import CallContext, CallerGoneError
from deconvd_server.log_text import excerpt
from deconvd_server.resources.fair_shares import PeerPlace
from deconvd_server.service.method import (
    BidiStreamingMethod,
    ClientStreamingMethod,
    OverlappedRequest,
    Parts,
    RpcMethod,
    ServerStreamingMethod,
    UnaryMethod,
)
from deconvd_server.transports.direct.last_caller import LastCaller
from deconvd_server.transports.direct.write_progress import WriteProgress
from deconvd_server.transports.observers import Observer
from deconvd_server.transports.serve import CallScope

__all__ = ["DirectConnection"]

_FAILURE_SEND_S: Final = 5.0
"""How long a client may take to hear that its call has failed."""

_HANDSHAKE_S: Final = 10.0
"""How long a client may take to say what it wants: it sends a few bytes, over a slow network at worst."""

_BUSY_POLL_S: Final = 5e-4
"""Longer than a client takes from an answer to its next call, if it does nothing in between."""

_log = logging.getLogger(__name__)


class _ConnectionState(Enum):
    """Where a line is in its life."""

    IDLE = "idle"
    BUSY = "busy"
    ENDED = "ended"


class DirectConnection:
    """Serves a line in a thread of its own: nothing is handed from thread to thread on a call's way.

    Attributes:
        thread: Serves it.
        descriptor: Its socket's.

    Args:
        stream: Is closed at the line's end.
        peer: Who calls, for the log.
        counted_by: By what the peer is counted. See `deconvd_server.resources.peer_keys`.
        behaviours: What serves the methods.
        instance: The server's id.
        attention: That of the server.
        observers: Hear of every call.
        on_end: Called when it ends, before its descriptor can be another's.
    """

    def __init__(
        self,
        stream: SocketStream,
        peer: str,
        counted_by: str,
        behaviours: Mapping[MethodCode, RpcMethod],
        instance: bytes,
        attention: LastCaller,
        observers: Sequence[Observer],
        on_end: Callable[[DirectConnection], None],
    ) -> None:
        self.descriptor = stream.descriptor
        self.thread = threading.Thread(target=self._serve, name=f"direct {peer}", daemon=True)
        self._stream = stream
        self._frames = FrameStream(stream, DirectProtocol(Role.SERVER, instance))
        self._peer = peer
        self._peer_key = counted_by
        self._methods = behaviours
        self._instance = instance
        self._last_caller = attention
        self._observers = observers
        self._polling = BusyPolling(_BUSY_POLL_S)
        self._on_end = on_end
        self._lock = threading.Lock()
        self._state = _ConnectionState.IDLE
        self._is_last = False
        self._is_cancelled = False
        self._call: CallContext | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it has no call under way."""
        return self._state is _ConnectionState.IDLE

    def start(self, place: PeerPlace) -> None:
        """Serve it from now on, in its thread; free its place at the end. Raises RuntimeError for want of threads."""
        self._place = place
        place.is_idle = True
        place.progressed_s = -math.inf  # before its greeting it gives way first of all
        self.thread.start()

    def refuse(self) -> None:
        """Close it instead of starting it."""
        self._frames.close()

    def close_when_idle(self) -> None:
        """End once the call under way has been answered; if there is none, now."""
        with self._lock:
            self._is_last = True
            if self._state is _ConnectionState.IDLE:
                self._frames.shutdown()

    def cancel(self) -> None:
        """Cancel the call under way and end: also on a client that does not read its answers."""
        with self._lock:
            self._is_last = self._is_cancelled = True
            call = self._call
            if self._state is not _ConnectionState.ENDED:
                self._frames.shutdown()
        if call is not None:
            call.cancel()

    def _serve(self) -> None:
        try:
            self._accept_handshake()
            while self._serve_one():
                pass
        except (ConnectionBrokenError, CallerGoneError) as error:
            _log.log(
                logging.DEBUG if self.is_idle else logging.INFO,
                "the direct line of %s has ended: %s",
                self._peer,
                excerpt(error),
            )
        except MemoryError:
            _log.warning("the direct line of %s has ended: memory has run out", self._peer)
        finally:
            with self._lock:
                self._state = _ConnectionState.ENDED
            self._on_end(self)
            self._frames.close()
            self._place.free()

    def _accept_handshake(self) -> None:
        self._frames.set_deadline(_HANDSHAKE_S)
        self._frames.next_event()
        self._frames.send(Hello(self._instance))
        self._frames.set_deadline(None)
        self._place.note_progress()

    def _serve_one(self) -> bool:
        """Serve the next call, and return whether there may be another."""
        self._polling.wait(self._frames, self._is_call_likely)
        head = self._frames.next_event()
        while isinstance(head, ProgressReport):  # what an early call was answered before
            head = self._frames.next_event()
        assert isinstance(head, CallHead), head  # nothing else may come
        self._last_caller.note_call(self)
        self._answer(head)
        return self._end_call()

    def _is_call_likely(self) -> bool:
        """Return whether the next call is likely to come on this line."""
        return self._last_caller.is_sole_caller(self)

    def _end_call(self) -> bool:
        self._frames.set_deadline(None)
        with self._lock:
            self._call = None
            if not self._is_last:
                self._state = _ConnectionState.IDLE
                self._place.is_idle = True
                self._place.progressed_s = time.monotonic()
            return not self._is_last

    def _answer(self, head: CallHead) -> None:
        """Serve a call, and send its answer or its failure."""
        method = self._methods[head.method]
        call = CallContext(head.timeout_s, self._peer, self._peer_key)
        call.sendable_bytes = MAX_MESSAGE_BYTES
        with self._lock:
            self._state = _ConnectionState.BUSY
            self._place.is_idle = False
            self._place.progressed_s = time.monotonic()
            self._call = call
            is_cancelled = self._is_cancelled
        if is_cancelled:  # before `cancel` could find this call
            call.cancel()
        self._frames.set_deadline(head.timeout_s + _FAILURE_SEND_S)
        scope = CallScope(method.name, call, self._observers)
        try:
            with scope:
                try:
                    self._respond(method, head, call)
                except MessageTooLargeError as error:
                    raise ExhaustedError(
                        f"the response has {error}: it must be requested by gRPC"
                    ) from None
                except ConnectionBrokenError as error:
                    raise CallerGoneError(str(error)) from error
            if scope.failure is not None:
                self._send_failure(scope.failure)
        finally:
            call.end()

    def _respond(self, behaviour: RpcMethod, head: CallHead, call: CallContext) -> None:
        if not isinstance(behaviour, UnaryMethod):
            call.client_wait, call.close_stream = self._stream, self._frames.shutdown
        match behaviour:
            case UnaryMethod():
                request = behaviour.decode_request(head.message)
                if head.is_overlapped:
                    writing = WriteProgress(self._frames, head.written_bytes)
                    call.client_wait, call.close_stream = writing, self._frames.shutdown
                    request = OverlappedRequest.of(request, writing)
                response = encode(behaviour.serve(request, call))
                self._frames.send(Answer(response, call.ledger.as_text()))
                return
            case ServerStreamingMethod():
                parts = behaviour.serve(behaviour.decode_request(head.message), call)
            case BidiStreamingMethod():
                parts = behaviour.serve(self._reader(behaviour, head.message), call)
            case ClientStreamingMethod():
                parts = _single_part(behaviour.serve(self._reader(behaviour, head.message), call))
            case _:
                raise ConnectionBrokenError(f"{behaviour.name} is not served directly")
        with closing(parts):
            for part in parts:
                self._frames.send_part(part)
        self._frames.send(EndOfStream(call.ledger.as_text()))

    def _reader(
        self, behaviour: BidiStreamingMethod | ClientStreamingMethod, message: bytes
    ) -> PartReader[Any]:
        return behaviour.reader(FrameSource(self._frames, behaviour.request_type, message))

    def _send_failure(self, failure: status_pb2.Status) -> None:
        """Say what a call has failed with. That ends the line if the call has parts."""
        self._frames.send(CallFailure(failure))
        if self._frames.protocol.state is ProtocolState.CLOSED:
            self._frames.half_close_and_drain(_FAILURE_SEND_S)
            raise ConnectionClosedError("a call in parts has failed")


def _single_part(message: Message) -> Parts:
    yield message

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
from deconvd.direct.connection_errors import LineBrokenError, LineClosedError, OversizedError
from deconvd.direct.events import (
    MAX_MESSAGE_BYTES,
    Answer,
    CallHead,
    End,
    Failed,
    Hello,
    Method,
    Written,
)
from deconvd.direct.frame_stream import FrameSource, Line
from deconvd.direct.protocol import DirectProtocol, Role, State
from deconvd.errors import ExhaustedError
from deconvd.wire.codec import encode
from deconvd.wire.stream_parts import PartReader
from deconvd_server.call.context import Call, CallerGoneError
from deconvd_server.log_text import excerpt
from deconvd_server.resources.fair_shares import Place
from deconvd_server.service.method import (
    Behaviour,
    EarlyRequest,
    Parts,
    Sink,
    Source,
    Stream,
    Unary,
)
from deconvd_server.transports.direct.last_caller import Attention
from deconvd_server.transports.direct.write_progress import Writing
from deconvd_server.transports.serve import Observer, Serving

__all__ = ["DirectLine"]

_GOODBYE_S: Final = 5.0
"""How long a client may take to hear that its call has failed."""

_GREETING_S: Final = 10.0
"""How long a client may take to say what it wants: it sends a few bytes, over a slow network at worst."""

_POLLED_S: Final = 5e-4
"""Longer than a client takes from an answer to its next call, if it does nothing in between."""

_log = logging.getLogger(__name__)


class _State(Enum):
    """Where a line is in its life."""

    IDLE = "idle"
    BUSY = "busy"
    ENDED = "ended"


class DirectLine:
    """Serves a line in a thread of its own: nothing is handed from thread to thread on a call's way.

    Attributes:
        thread: Serves it.
        descriptor: Its socket's.

    Args:
        stream: Is closed at the line's end.
        peer: Who calls, for the log.
        counted_by: By what the peer is counted. See `deconvd_server.resources.peers`.
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
        behaviours: Mapping[Method, Behaviour],
        instance: bytes,
        attention: Attention,
        observers: Sequence[Observer],
        on_end: Callable[[DirectLine], None],
    ) -> None:
        self.descriptor = stream.descriptor
        self.thread = threading.Thread(target=self._serve, name=f"direct {peer}", daemon=True)
        self._stream = stream
        self._line = Line(stream, DirectProtocol(Role.SERVER, instance))
        self._peer = peer
        self._counted_by = counted_by
        self._behaviours = behaviours
        self._instance = instance
        self._attention = attention
        self._observers = observers
        self._polling = BusyPolling(_POLLED_S)
        self._on_end = on_end
        self._lock = threading.Lock()
        self._state = _State.IDLE
        self._is_last = False
        self._is_cancelled = False
        self._call: Call | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it has no call under way."""
        return self._state is _State.IDLE

    def start(self, place: Place) -> None:
        """Serve it from now on, in its thread; free its place at the end. Raises RuntimeError for want of threads."""
        self._place = place
        place.is_idle = True
        place.progressed_s = -math.inf  # before its greeting it gives way first of all
        self.thread.start()

    def refuse(self) -> None:
        """Close it instead of starting it."""
        self._line.close()

    def take_no_more(self) -> None:
        """End once the call under way has been answered; if there is none, now."""
        with self._lock:
            self._is_last = True
            if self._state is _State.IDLE:
                self._line.shut()

    def cancel(self) -> None:
        """Cancel the call under way and end: also on a client that does not read its answers."""
        with self._lock:
            self._is_last = self._is_cancelled = True
            call = self._call
            if self._state is not _State.ENDED:
                self._line.shut()
        if call is not None:
            call.cancel()

    def _serve(self) -> None:
        try:
            self._greet()
            while self._serve_one():
                pass
        except (LineBrokenError, CallerGoneError) as error:
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
                self._state = _State.ENDED
            self._on_end(self)
            self._line.close()
            self._place.free()

    def _greet(self) -> None:
        self._line.set_deadline(_GREETING_S)
        self._line.next_event()
        self._line.send(Hello(self._instance))
        self._line.set_deadline(None)
        self._place.note_progress()

    def _serve_one(self) -> bool:
        """Serve the next call, and return whether there may be another."""
        self._polling.wait(self._line, self._is_awaited)
        head = self._line.next_event()
        while isinstance(head, Written):  # what an early call was answered before
            head = self._line.next_event()
        assert isinstance(head, CallHead), head  # nothing else may come
        self._attention.note_call(self)
        self._answer(head)
        return self._is_idle_again()

    def _is_awaited(self) -> bool:
        """Return whether the next call is likely to come on this line."""
        return self._attention.is_undivided(self)

    def _begin(self, timeout_s: float) -> Call:
        """Begin a call, which `cancel` ends: at once, if it was asked for before."""
        call = Call(timeout_s, self._peer, self._counted_by)
        call.sendable_bytes = MAX_MESSAGE_BYTES
        with self._lock:
            self._state = _State.BUSY
            self._place.is_idle = False
            self._place.progressed_s = time.monotonic()
            self._call = call
            is_cancelled = self._is_cancelled
        self._line.set_deadline(timeout_s + _GOODBYE_S)
        if is_cancelled:
            call.cancel()
        return call

    def _is_idle_again(self) -> bool:
        self._line.set_deadline(None)
        with self._lock:
            self._call = None
            if not self._is_last:
                self._state = _State.IDLE
                self._place.is_idle = True
                self._place.progressed_s = time.monotonic()
            return not self._is_last

    def _answer(self, head: CallHead) -> None:
        behaviour = self._behaviours[head.method]
        serving = Serving(behaviour.name, self._begin(head.timeout_s), self._observers)
        try:
            with serving as call:
                try:
                    self._respond(behaviour, head, call)
                except OversizedError as error:
                    raise ExhaustedError(
                        f"the response has {error}: it is to be made by gRPC"
                    ) from None
                except LineBrokenError as error:
                    raise CallerGoneError(str(error)) from error
            if serving.failure is not None:
                self._fail(serving.failure)
        finally:
            serving.call.end()

    def _respond(self, behaviour: Behaviour, head: CallHead, call: Call) -> None:
        if not isinstance(behaviour, Unary):
            call.waiting, call.hang_up = self._stream, self._line.shut
        match behaviour:
            case Unary():
                request = behaviour.decoded(head.message)
                if head.is_early:
                    writing = Writing(self._line, head.written_bytes)
                    call.waiting, call.hang_up = writing, self._line.shut
                    request = EarlyRequest.of(request, writing)
                response = encode(behaviour.serve(request, call))
                self._line.send(Answer(response, call.ledger.as_text()))
                return
            case Source():
                parts = behaviour.serve(behaviour.decoded(head.message), call)
            case Stream():
                parts = behaviour.serve(self._reader(behaviour, head.message), call)
            case Sink():
                parts = _alone(behaviour.serve(self._reader(behaviour, head.message), call))
            case _:
                raise LineBrokenError(f"{behaviour.name} is not served directly")
        with closing(parts):
            for part in parts:
                self._line.send_part(part)
        self._line.send(End(call.ledger.as_text()))

    def _reader(self, behaviour: Stream | Sink, message: bytes) -> PartReader[Any]:
        return behaviour.reader(FrameSource(self._line, behaviour.request_type, message))

    def _fail(self, failure: status_pb2.Status) -> None:
        """Say what a call has failed with. That ends the line if the call has parts."""
        self._line.send(Failed(failure))
        if self._line.protocol.state is State.CLOSED:
            self._line.end_gently(_GOODBYE_S)
            raise LineClosedError("a call in parts has failed")


def _alone(message: Message) -> Parts:
    yield message

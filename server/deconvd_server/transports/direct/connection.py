"""The server's end of one direct connection: it serves one call after the other. See `deconvd.direct.protocol`.

Whose thread serves it, its own or one that serves others, too, is the matter of `LeaderFollowers`.

    IDLE --a call comes--> BUSY --answered--> IDLE
      |                      |
      `--asked to close------`--asked to close, and answered--> ENDED

A connection that breaks, or whose client goes, is ENDED at once, from either state.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Final

from google.rpc import status_pb2

from deconvd.direct.busy_polling import BusyPolling
from deconvd.direct.connection_errors import ConnectionBrokenError, ConnectionClosedError
from deconvd.direct.events import (
    MAX_MESSAGE_BYTES,
    CallHead,
    Event,
    Hello,
    MethodCode,
    ProgressReport,
    StripedCallHead,
    StripeHead,
)
from deconvd.direct.frame_stream import FrameStream
from deconvd.direct.tls_stream import TlsStream
from deconvd.wire.stream_parts import PendingElements
from deconvd_server.call.context import CallContext, CallerGoneError
from deconvd_server.log_handler import REPEAT_KEY
from deconvd_server.log_text import excerpt
from deconvd_server.resources.fair_shares import PeerPlace
from deconvd_server.service.method import RpcMethod
from deconvd_server.transports.direct.greeter import GreetedClient
from deconvd_server.transports.direct.last_caller import LastCaller
from deconvd_server.transports.direct.leader_followers import LeaderFollowers
from deconvd_server.transports.direct.responder import Responder
from deconvd_server.transports.direct.stripe import Stripe
from deconvd_server.transports.direct.transfers import TransferTable
from deconvd_server.transports.observers import Observer

__all__ = ["DirectConnection"]

_HELLO_SEND_S: Final = 10.0
"""How long a client may take to receive the server's greeting: a few bytes, over a slow network at worst."""

_BUSY_POLL_S: Final = 5e-4
"""Longer than a client takes from an answer to its next call if it does nothing in between."""

_SMALL_METHODS: Final = frozenset({MethodCode.Deconvolve, MethodCode.DeconvolveGrad})
"""Methods whose calls may be small. They tell if they are not."""

_MIN_CALLS_ALONE: Final = 64
_MAX_CALLS_ALONE: Final = 4096
"""After a call that lasted unforeseen, a connection makes that many small ones before others wait for it again."""

_log = logging.getLogger(__name__)


class _ConnectionState(Enum):
    """Where a connection is in its life."""

    IDLE = "idle"
    BUSY = "busy"
    ENDED = "ended"


class DirectConnection:
    """Serves one direct connection. No call passes from one thread to another.

    Attributes:
        ended: Set once it has ended, and its place is free.
        descriptor: The descriptor of its socket.
        caller_pass: Who the client is.
        peer_key: The peer that the client counts for. See `deconvd_server.resources.peer_identity`.
        last_turn: See `SharedConnection`.

    Args:
        client: The client, which has greeted. Its stream is closed when this ends.
        methods: The methods by their codes.
        transfers: The striped calls, shared by all direct connections of the server.
        instance: The server's id.
        last_caller, leaders: Shared by all direct connections of the server.
        observers: They are told of every call.
        on_end: Called when it ends, while the descriptor still belongs to it.
    """

    def __init__(
        self,
        client: GreetedClient,
        methods: Mapping[MethodCode, RpcMethod],
        transfers: TransferTable,
        instance: bytes,
        last_caller: LastCaller,
        leaders: LeaderFollowers,
        observers: Sequence[Observer],
        on_end: Callable[[DirectConnection], None],
    ) -> None:
        self.descriptor = client.stream.descriptor
        self.ended = threading.Event()
        self.caller_pass = client.caller_pass
        self.peer_key = client.caller_pass.caller.peer_key
        self._identity = client.caller_pass.caller.identity
        self._stream = client.stream
        self._frames = FrameStream(client.stream, client.protocol)
        self._peer = client.peer
        self._transport = client.transport
        self._methods = methods
        self._transfers = transfers
        self._instance = instance
        self._last_caller = last_caller
        self._leaders = leaders
        self.last_turn = 0
        # OpenSSL may have received a call of which the socket shows nothing.
        self._may_share = not isinstance(client.stream, TlsStream)
        self._is_small = False  # the last call
        self._penalty_count = _MIN_CALLS_ALONE
        self._calls_alone_count = 0  # that are yet to be served before it may be shared
        self._polling = BusyPolling(_BUSY_POLL_S)
        self._on_end = on_end
        self._lock = threading.Lock()
        self._state = _ConnectionState.IDLE
        self._has_greeted = False
        self._is_last = False
        self._is_cancelled = False
        self._call: CallContext | None = None
        self._stripe: Stripe | None = None
        self._responder = Responder(client, self._frames, transfers, observers)

    @property
    def is_idle(self) -> bool:
        """Whether it has no call under way."""
        return self._state is _ConnectionState.IDLE

    def was_used_within(self, age_s: float) -> bool:
        """Return whether it has a call under way, or had one within that time, or has begun within it."""
        used_s = max(self._place.progressed_s, self._began_s)
        return not self.is_idle or time.monotonic() - used_s < age_s

    def start(self, place: PeerPlace) -> None:
        """Start a thread, which serves it. At its end it frees the place.

        Raises:
            RuntimeError: The system has no thread left.
        """
        self._place = place
        self._began_s = time.monotonic()
        place.is_idle = True
        place.progressed_s = (
            -math.inf
        )  # until it has greeted its client, it is the first to be preempted
        threading.Thread(
            target=self._leaders.serve, args=(self,), name="direct-call", daemon=True
        ).start()

    def refuse(self) -> None:
        """Close the connection instead of starting the thread."""
        self._frames.close()

    def close_when_idle(self) -> None:
        """End once the call under way has been answered; at once if there is no call."""
        with self._lock:
            self._is_last = True
            if self._state is _ConnectionState.IDLE:
                self._frames.shutdown()

    def cancel(self) -> None:
        """Cancel the call under way, and end. This works for clients that do not read their answers, too."""
        with self._lock:
            self._is_last = self._is_cancelled = True
            call, stripe = self._call, self._stripe
            if self._state is not _ConnectionState.ENDED:
                self._frames.shutdown()
        if call is not None:
            call.cancel()
        if stripe is not None:
            stripe.cancel()

    def abort(self, failure: status_pb2.Status) -> None:
        """See `Responder.abort`."""
        self._responder.abort(failure)

    def serve_alone(self) -> bool:
        """See `SharedConnection`."""
        return self._serve_until_end(self._serve_calls_alone)

    def serve_next(self) -> bool:
        """See `SharedConnection`."""
        return self._serve_until_end(self._serve_next_call)

    def _serve_until_end(self, serve: Callable[[], bool]) -> bool:
        """Serve calls, and end the connection unless it is still open afterwards. Return whether it is."""
        is_open = False
        try:
            is_open = serve()
        except (ConnectionBrokenError, CallerGoneError, MemoryError) as error:
            self._log_end(error)
        finally:
            if not is_open:
                self._end()
        return is_open

    def _serve_calls_alone(self) -> bool:
        if not self._has_greeted:
            self._greet()
        while True:
            self._polling.wait(self._frames, self._is_call_likely)
            is_open = self._serve_call(self._frames.next_event())
            if not is_open or self._is_next_small():
                return is_open

    def _serve_next_call(self) -> bool:
        event = self._frames.try_next_event()
        if event is None:  # the rest may take any time
            self._note_long()
            event = self._frames.next_event()
        is_open = self._serve_call(event)
        if self._frames.protocol.unread_bytes:  # of which the socket shows nothing
            self._note_long()
        return is_open

    def note_late(self) -> None:
        """See `SharedConnection`. Clients that do not take their answers make others wait so: seldom, therefore."""
        self._penalty_count = min(2 * self._penalty_count, _MAX_CALLS_ALONE)
        self._calls_alone_count = self._penalty_count

    def _log_end(self, error: Exception) -> None:
        if isinstance(error, MemoryError):
            key = {REPEAT_KEY: (__name__, MemoryError)}
            _log.warning(
                "the direct connection of %s has ended: memory has run out", self._peer, extra=key
            )
            return
        is_expected = self.is_idle or self._stripe is not None  # a striped call logs its failure
        _log.log(
            logging.DEBUG if is_expected else logging.INFO,
            "the direct connection of %s has ended: %s",
            self._peer,
            excerpt(error),
            extra={REPEAT_KEY: (__name__, type(error))},
        )

    def _end(self) -> None:
        with self._lock:
            self._state = _ConnectionState.ENDED
        self._leaders.forget(self)
        self._on_end(self)
        self._frames.close()
        self._place.free()
        self.ended.set()

    def _greet(self) -> None:
        self._has_greeted = True
        self._frames.set_deadline(_HELLO_SEND_S)
        self._frames.send(Hello(self._instance))
        self._frames.set_deadline(None)
        self._place.note_progress()

    def _is_next_small(self) -> bool:
        """Return whether the connection may be shared: its next call is likely to be small, as the last one was."""
        if not self._is_small or not self._may_share or self._frames.protocol.unread_bytes:
            return False
        if self._calls_alone_count:
            self._calls_alone_count -= 1
            return False
        return True

    def _note_long(self) -> None:
        """Let others be served meanwhile: the call under way is not small, or must wait."""
        self._leaders.hand_over(self)

    def _serve_call(self, head: Event | PendingElements) -> bool:
        """Serve a call, and return whether there may be another."""
        while isinstance(
            head, ProgressReport
        ):  # of an overlapped call that was answered before it came
            self._note_long()
            head = self._frames.next_event()
        if not self.caller_pass.is_valid():
            _log.info("%s may no longer call: its credentials have ended", self._peer)
            raise ConnectionClosedError("its credentials have ended")
        if isinstance(head, StripeHead):
            self._is_small = False
            self._note_long()
            self._serve_stripe(head)
            return self._end_call()
        assert isinstance(head, CallHead | StripedCallHead), (
            head
        )  # the protocol allows nothing else
        self._last_caller.note_call(self)
        self._answer(head)
        return self._end_call()

    def _is_call_likely(self) -> bool:
        """Return whether the next call is likely to come on this connection."""
        return self._last_caller.is_sole_caller(self)

    def _end_call(self) -> bool:
        self._frames.set_deadline(None)
        with self._lock:
            self._call = self._stripe = None
            if not self._is_last:
                self._state = _ConnectionState.IDLE
                self._place.is_idle = True
                self._place.progressed_s = time.monotonic()
            return not self._is_last

    def _begin_call(self) -> None:
        """Leave the state IDLE. Called with the lock held."""
        self._state = _ConnectionState.BUSY
        self._place.is_idle = False
        self._place.progressed_s = time.monotonic()

    def _serve_stripe(self, head: StripeHead) -> None:
        """Carry a part of the elements of a striped call, which another connection has or will have."""
        stripe = Stripe(self._frames, self._stream)
        with self._lock:
            self._begin_call()
            self._stripe = stripe
            is_cancelled = self._is_cancelled
        if is_cancelled:  # before `cancel` could find this stripe
            stripe.cancel()
        stripe.serve(self._transfers, head.transfer, self.peer_key)

    def _answer(self, head: CallHead | StripedCallHead) -> None:
        """Serve a call, and send its answer or its failure."""
        if (
            head.method not in _SMALL_METHODS
            or isinstance(head, StripedCallHead)
            or head.is_overlapped
        ):
            self._note_long()
        call = CallContext(
            head.timeout_s, self._peer, self.peer_key, self._identity, self._transport
        )
        call.sendable_bytes = MAX_MESSAGE_BYTES
        call.note_long = self._note_long
        with self._lock:
            self._begin_call()
            self._call = call
            is_cancelled = self._is_cancelled
        if is_cancelled:  # before `cancel` could find this call
            call.cancel()
        try:
            self._responder.serve(self._methods[head.method], head, call)
        finally:
            call.end()
            self._is_small = call.is_small

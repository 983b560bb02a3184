"""The gRPC server: one thread takes the events of gRPC's queue, which are new calls and finished batches. See `rpc`.

A call whose caller is not known is refused before anything is received of it, whatever its method.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, Final, TypeAlias

import grpc

from deconvd.errors import DeadlineError, UnauthenticatedError
from deconvd.wire.grpc_options import GRPC_OPTIONS
from deconvd.wire.status import status_from_error
from deconvd_server.call.context import STALL_LIMIT_S
from deconvd_server.resources.accept_loop import SHORTAGE_PAUSE_S
from deconvd_server.transports.grpc.callers import CallerReader
from deconvd_server.transports.grpc.core import cygrpc
from deconvd_server.transports.grpc.rpc import Rpc

__all__ = ["GrpcServer", "Handlers"]

Handlers: TypeAlias = Mapping[str, Callable[[Rpc], None]]
"""The functions that take new calls, by the paths of their methods. They run in gRPC's thread."""

_ACCEPT_BACKLOG_COUNT: Final = 64
"""How many new calls gRPC may hand over at once. Others wait inside gRPC, which ends them if the server stops."""

_STREAMS_COUNT: Final = 512
"""How many calls one connection may have under way; the client holds further ones back. It is large because a proxy
carries the calls of many clients on one connection."""

_HANDSHAKE_S: Final = 10.0
"""How long a connection may take for its handshakes, of TLS and of HTTP/2: several round trips on any network."""

_LAST_CALLS_S: Final = 1.0
"""How long the calls of a connection that has lasted long enough may take to end."""

_DRAIN_EVENTS_S: Final = 0.05
"""How long `drain_events` takes events at most: while it does, new ones may come without end."""

_LOOKAHEAD_OPTION: Final = "grpc.http2.lookahead_bytes"

_LARGEST_LOOKAHEAD_BYTES: Final = 64 << 20
"""What a connection of 10 Gbit/s carries in 50 ms: a larger window makes no call faster."""

_LEAST_LOOKAHEAD_BYTES: Final = 65535
"""The window with which HTTP/2 lets every client begin."""

_LOOKAHEAD_PART: Final = 64
"""A client may send this part of the memory for messages, one in 64, before the server asks for its next message. A
larger window makes calls over long distances faster: with less, gRPC asks for one mebibyte in each round trip."""

_FIRST_MESSAGE_S: Final = 60.0
"""How long a call may take to send its first message: enough for a large one over a slow network."""

_NO_MESSAGE: Final = DeadlineError(f"the call has sent no message for {_FIRST_MESSAGE_S:g} s")

_SLOWEST_BYTES_PER_S: Final = 1e6
"""How fast an answer must leave, as over a network of 8 Mbit/s, after the time for which any call may stall. gRPC does
not tell how much of an answer has left, only when all of it has."""

_EXPIRY_PERIOD_S: Final = 1.0
"""How often it looks for calls whose clients are too slow."""

_TICK_S: Final = 0.2
"""How often the thread looks at its timers when no event comes: another thread may add one without waking it."""

_log = logging.getLogger(__name__)


class GrpcServer:
    """Serves calls by gRPC, in a thread of its own.

    Attributes:
        rpcs: The calls that are not done.

    Args:
        handlers: The handlers of all methods.
        callers: Reads who makes a call.
        max_message_bytes: The largest message that it receives or sends.
        arriving_bytes: The memory that messages may take before their calls are admitted.
        connections_count: How many connections it may have.
        streams_count: How many calls one connection may have under way.
        connection_age_s: How long a connection may last, with or without calls; None for as long as its client likes.
        shares_ports: Whether other processes of this user may listen on the same TCP ports.
        on_lost: Called if the thread ends without being stopped.
    """

    def __init__(
        self,
        handlers: Handlers,
        callers: CallerReader,
        *,
        max_message_bytes: int,
        arriving_bytes: int,
        connections_count: int,
        streams_count: int = _STREAMS_COUNT,
        connection_age_s: float | None = None,
        shares_ports: bool = False,
        on_lost: Callable[[], None],
    ) -> None:
        unasked_bytes = min(
            max(arriving_bytes // _LOOKAHEAD_PART, _LEAST_LOOKAHEAD_BYTES), _LARGEST_LOOKAHEAD_BYTES
        )
        options: Sequence[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.max_concurrent_streams", streams_count),
            ("grpc.max_allowed_incoming_connections", connections_count),
            ("grpc.server_handshake_timeout_ms", int(_HANDSHAKE_S * 1000)),
            *(option for option in GRPC_OPTIONS if option[0] != _LOOKAHEAD_OPTION),
            (_LOOKAHEAD_OPTION, unasked_bytes),
            # Otherwise a second server could share the port, and nobody would notice.
            ("grpc.so_reuseport", int(shares_ports)),
        ]
        if connection_age_s is not None:
            age_ms = int(connection_age_s * 1000)
            options = [
                *options,
                ("grpc.max_connection_age_ms", age_ms),
                ("grpc.max_connection_age_grace_ms", int(_LAST_CALLS_S * 1000)),
            ]
        self._handlers = handlers
        self._callers = callers
        self._credentials: list[Any] = []  # gRPC's core refers to them, but does not hold them
        self._on_lost = on_lost
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(options, False)
        self._server.register_completion_queue(self._queue)
        self.rpcs: set[Rpc] = set()
        self._lock = threading.Lock()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._is_stopping = False
        self._has_shut_down = False
        self._thread = threading.Thread(target=self._run, name="grpc", daemon=True)

    def add_insecure_port(self, address: str) -> int:
        """Listen on an address; return its port. Raises RuntimeError if gRPC cannot."""
        return self._add_port(address)

    def add_secure_port(self, address: str, server_credentials: Any) -> int:
        """Do the same, with TLS. See `deconvd_server.transports.grpc.tls`."""
        self._credentials.append(server_credentials)
        return self._add_port(address, server_credentials)

    def _add_port(self, address: str, *credentials: Any) -> int:
        port: int = self._server.add_http2_port(address.encode(), *credentials)
        if not port:
            raise RuntimeError(f"gRPC cannot listen on {address}")
        return port

    def start(self) -> None:
        """Serve from now on."""
        self._server.start()
        for _ in range(_ACCEPT_BACKLOG_COUNT):
            self._request_call()
        self._expire()
        self._thread.start()

    def call_later(self, delay_s: float, work: Callable[[], None]) -> None:
        """Call a function in gRPC's thread after a number of seconds. Any thread may ask for it."""
        entry = (time.monotonic() + delay_s, next(self._numbers), work)
        with self._lock:
            heapq.heappush(self._timers, entry)

    def drain_events(self) -> None:
        """Take the events that have come already, in the midst of handling one. For gRPC's thread."""
        until_s = time.monotonic() + _DRAIN_EVENTS_S
        while time.monotonic() < until_s:
            event = self._queue.poll(time.time())
            if event.completion_type == cygrpc.CompletionType.queue_timeout:
                break
            event.tag(event)

    def stop_accepting(self) -> None:
        """Take no more calls, and tell clients to connect elsewhere. Calls under way go on."""
        self._is_stopping = True
        self._server.shutdown(self._queue, self._note_shutdown)

    def cancel_all(self) -> None:
        """Cancel the calls under way."""
        self._server.cancel_all_calls()

    def join(self) -> None:
        """Wait for its last call, and stop. Call it once `stop_accepting` has returned."""
        self._thread.join()
        if (
            self._has_shut_down
        ):  # a thread that was lost has not seen it, and gRPC may be using the server still
            self._server.destroy()

    def _request_call(self) -> None:
        with suppress(ValueError):  # raised once the server stops
            self._server.request_call(self._queue, self._queue, self._accept_call)

    def _run(self) -> None:
        """Take one event after the other until the server has shut down and its last call is done."""
        try:
            while self.rpcs or not self._has_shut_down:
                self._take_events()
            self._queue.shutdown()
            while self._queue.poll().completion_type != cygrpc.CompletionType.queue_shutdown:
                pass
        except BaseException:  # noqa: BLE001 - logged, and the server ends
            _log.exception("gRPC's thread has ended")
        if not self._is_stopping:
            self._on_lost()

    def _take_events(self) -> None:
        """Take events, and call functions that are due, until the server has shut down or one of these fails.

        No error in them ends the thread.
        """
        event: Any = None
        try:
            while self.rpcs or not self._has_shut_down:
                wait_s = _TICK_S
                if self._timers:
                    wait_s = min(wait_s, max(self._timers[0][0] - time.monotonic(), 0))
                event = self._queue.poll(time.time() + wait_s)
                if event.completion_type != cygrpc.CompletionType.queue_timeout:
                    event.tag(event)
                event = None  # it holds the message, which its call may have dropped by now
                if self._timers and self._timers[0][0] <= time.monotonic():
                    self._run_due_timers()
        except MemoryError:
            self._fail_lost_receives()
            self._request_call()  # the event of a new call may have been lost, and with it a request
        except Exception:  # noqa: BLE001 - logged: one call's error must not end all
            _log.exception("unforeseen error in gRPC's thread")

    def _run_due_timers(self) -> None:
        now_s = time.monotonic()
        while self._timers and self._timers[0][0] <= now_s:
            with self._lock:
                timer = heapq.heappop(self._timers)
            try:
                timer[2]()
            except MemoryError:
                with self._lock:  # else what calls itself again ends for good
                    heapq.heappush(self._timers, timer)
                _log.warning("gRPC's thread has no memory for what is due: it is done later")
                time.sleep(SHORTAGE_PAUSE_S)
                return

    def _note_shutdown(self, _event: Any) -> None:
        self._has_shut_down = True

    def _accept_call(self, event: Any) -> None:
        """Take a new call, and ask for the next."""
        self._request_call()
        if not event.success:  # the server stops: gRPC gives back what was asked for
            return
        rpc = Rpc(event, self.call_later, self.rpcs.discard)
        self.rpcs.add(rpc)
        if not self._callers.is_open:
            try:
                rpc.authenticate(self._callers.read(event.call, rpc.metadata, rpc.peer))
            except UnauthenticatedError as error:
                self._callers.note_refusal(rpc.path, rpc.peer, error)
                rpc.fail(status_from_error(error))
                return
        self._handlers.get(rpc.path, _refuse)(rpc)

    def _expire(self) -> None:
        """End the calls whose first message or whose answer takes too long, now and from now on. For gRPC's thread.

        Whatever their method: gRPC keeps a call until its client has sent and read everything, and a client may have
        hundreds on each of its connections.
        """
        now_s = time.monotonic()
        for rpc in list(self.rpcs):
            if now_s > rpc.answered_s + STALL_LIMIT_S + rpc.answer_bytes / _SLOWEST_BYTES_PER_S:
                rpc.cancel()  # for a client that does not read
            elif not rpc.has_received and now_s > rpc.receive_began_s + _FIRST_MESSAGE_S:
                rpc.fail(status_from_error(_NO_MESSAGE))
        self.call_later(_EXPIRY_PERIOD_S, self._expire)

    def _fail_lost_receives(self) -> None:
        """Fail the calls whose message came when there was no memory to hand it over.

        The interpreter raised MemoryError while gRPC's bindings made the event, and the batch is lost with it: nobody
        would ever answer these calls.
        """
        _log.warning("there is no memory for a message that has arrived by gRPC")
        for rpc in list(self.rpcs):
            if rpc.drop_lost_receive():
                rpc.fail_with(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "the server has no memory for such a message",
                )


def _refuse(rpc: Rpc) -> None:
    rpc.fail_with(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")

"""Greets new connections: TLS, the client's first frame, and who it is. Only then they get a place and a thread.

READING --the client has greeted--> GREETED
   |
   `--it breaks a rule, proves nothing, takes too long, or others need the place--> closed
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

from deconvd.direct.byte_stream import SocketStream
from deconvd.direct.connection_errors import ConnectionClosedError
from deconvd.direct.events import Hello
from deconvd.direct.protocol import DirectProtocol, Role
from deconvd.direct.tls_engine import TlsEngine
from deconvd.direct.tls_stream import TlsStream
from deconvd.errors import UnauthenticatedError, UnavailableError
from deconvd_server.access.authenticator import Authenticator
from deconvd_server.access.caller_pass import CallerPass, shown_certificate
from deconvd_server.access.caller_proof import CallerProof
from deconvd_server.access.server_tls import ServerTls
from deconvd_server.call.context import STALL_LIMIT_S
from deconvd_server.log_text import excerpt
from deconvd_server.resources.accept_loop import Listener
from deconvd_server.resources.descriptors import connections_count
from deconvd_server.resources.fair_shares import FairShares, PeerPlace
from deconvd_server.resources.peer_identity import peer_key_of_connection
from deconvd_server.resources.unix_listener import peer_credentials

__all__ = ["GreetedClient", "Greeter"]

_HANDSHAKE_S: Final = 10.0
"""How long a client may take to greet: a few kilobytes, over a slow network at worst."""

_GREETINGS_COUNT: Final = 128
"""How many clients are greeted at the same time. Each takes a descriptor, and some memory once it has sent anything."""

_DESCRIPTORS_PART: Final = 4
"""Or one in so many of the descriptors that connections may have, if that is less."""

_RESERVED_PART: Final = 4
"""One in so many of the places is for peers that have none."""

_RECEIVE_BYTES: Final = 16 << 10
"""How much is read from a client in one turn, so that none keeps the others waiting."""

_log = logging.getLogger(__name__)


class GreetedClient(NamedTuple):
    """A client that has greeted.

    Attributes:
        stream: The connection to it.
        protocol: Its state: the client waits for the server's greeting.
        peer: Its address, for the log.
        transport: What carries the connection: ``unix`` or ``tcp``.
        caller_pass: Who it is.
    """

    stream: SocketStream
    protocol: DirectProtocol
    peer: str
    transport: str
    caller_pass: CallerPass


class Greeter:
    """Greets clients, in the thread that accepts connections: a slow one takes no thread, and keeps nobody waiting.

    Peers share the places for clients that are being greeted. If there are too few, the oldest of the peer with the
    most is closed, or the oldest of the peer that asks: so a client that greets at once is greeted, whatever others of
    its address do.

    All methods are called in the listener's thread; `close` after its end. What strangers cause is logged at DEBUG.

    Args:
        listener: Tells when clients have sent something.
        authenticator: Says who they are.
        tls: How connections by TCP are encrypted; None if they are not.
        instance: The server's id.
        on_greeted: Called with each client that has greeted. It owns the connection, and raises nothing.
    """

    def __init__(
        self,
        listener: Listener,
        authenticator: Authenticator,
        tls: ServerTls | None,
        instance: bytes,
        on_greeted: Callable[[GreetedClient], None],
    ) -> None:
        self._listener = listener
        self._authenticator = authenticator
        self._tls = tls
        self._instance = instance
        self._on_greeted = on_greeted
        places_count = min(_GREETINGS_COUNT, max(connections_count() // _DESCRIPTORS_PART, 1))
        self._shares = FairShares(
            places_count, places_count // _RESERVED_PART, "greetings", log_level=logging.DEBUG
        )
        self._greetings: dict[_Greeting, None] = {}  # the oldest first
        self._buffer = memoryview(bytearray(_RECEIVE_BYTES))

    def begin(self, connection: socket.socket, address: Any) -> None:
        """Greet a client. The connection is closed if it must not be, or cannot be.

        Args:
            address: The client's address, as `accept` returned it.

        Raises:
            OSError, MemoryError: The system has too little of something. The caller closes the connection.
        """
        connection.setblocking(False)
        greeting = _Greeting(connection, address)
        preempt = partial(self._drop, greeting, "others need the place")
        try:
            greeting.place = self._shares.take(greeting.peer_key, preempt)
        except UnavailableError as error:
            _log.debug("%s is not served directly: %s", greeting.peer, error)
            connection.close()
            return
        greeting.place.is_idle = True  # so that the oldest makes room for others of its peer, too
        try:
            if not self._greetings:
                self._listener.call_later(_HANDSHAKE_S, self._drop_late)
            self._greetings[greeting] = None
            self._listener.watch(connection.fileno(), partial(self._advance, greeting))
        except BaseException:
            self._greetings.pop(greeting, None)
            greeting.place.free()
            del greeting.place
            raise
        self._advance(greeting)

    def close(self) -> None:
        """Close the connections of all clients that have not greeted yet."""
        for greeting in [*self._greetings]:
            self._drop(greeting, "the server stops")

    def _advance(self, greeting: _Greeting) -> None:
        """Read what a client has sent."""
        try:
            hello = greeting.receive(self._buffer, self._tls, self._instance)
            if hello is None:
                self._listener.watch(
                    greeting.socket.fileno(), partial(self._advance, greeting), greeting.events
                )
                return
            caller_pass = greeting.identify(self._authenticator, hello.token)
            stream = greeting.open_stream()
        except (UnauthenticatedError, OSError, MemoryError) as error:  # by gRPC it hears why
            self._drop(greeting, excerpt(error) or "memory has run out")
        else:
            self._forget(greeting)
            transport = "unix" if greeting.is_local else "tcp"
            self._on_greeted(
                GreetedClient(stream, greeting.protocol, greeting.peer, transport, caller_pass)
            )

    def _drop_late(self) -> None:
        """Close what has taken too long, and look again when the next one has."""
        now_s = time.monotonic()
        for greeting in [*self._greetings]:
            if greeting.began_s + _HANDSHAKE_S > now_s:
                self._listener.call_later(greeting.began_s + _HANDSHAKE_S - now_s, self._drop_late)
                return
            self._drop(greeting, "it has not greeted in time")

    def _drop(self, greeting: _Greeting, reason: str) -> None:
        _log.debug("the direct connection of %s is closed: %s", greeting.peer, reason)
        self._forget(greeting)
        greeting.socket.close()

    def _forget(self, greeting: _Greeting) -> None:
        if self._greetings.pop(greeting, greeting) is None:
            self._listener.unwatch(greeting.socket.fileno())
            greeting.place.free()
            del greeting.place  # it refers to the greeting, for its preemption


class _Greeting:
    """What has come of one client's greeting.

    Attributes:
        socket: The connection, which does not block.
        peer: The client's address, for the log.
        peer_key: The peer that it counts for until it has said who it is.
        began_s: When it began, on the monotonic clock.
        place: Its place among the clients that are being greeted.
        events: What to wait for.
    """

    place: PeerPlace
    protocol: DirectProtocol

    def __init__(self, connection: socket.socket, address: Any) -> None:
        self.socket = connection
        self.is_local = connection.family == socket.AF_UNIX
        self.peer = _describe_peer(connection, address)
        self.peer_key = peer_key_of_connection(connection, address)
        self.began_s = time.monotonic()
        self.events = select.EPOLLIN
        self._has_begun = False
        self._engine: TlsEngine | None = None
        self._unsent = b""

    def receive(self, buffer: memoryview, tls: ServerTls | None, instance: bytes) -> Hello | None:
        """Read what has come, once. Return the client's HELLO; None until it is complete.

        Args:
            buffer: Memory to read into.
            tls: How to encrypt connections by TCP.

        Raises:
            ConnectionBrokenError: The client has gone, or broken a rule.
            OSError: The connection is broken.
        """
        if self._unsent:
            self._send(b"")
        try:
            count = self.socket.recv_into(buffer)
        except BlockingIOError:
            return None
        if not count:
            raise ConnectionClosedError("the client has closed it")
        if not self._has_begun:  # a client that sends nothing takes no memory
            self._has_begun = True
            self.protocol = DirectProtocol(Role.SERVER, instance)
            if tls is not None and not self.is_local:
                self._engine = TlsEngine(tls.current().context, None)
        if self._engine is not None:
            count = self._decrypt(self._engine, buffer, count)
        self.protocol.receive_buffer()[:count] = buffer[:count]
        self.protocol.note_received(count)
        event = self.protocol.next_event()
        assert event is None or isinstance(event, Hello), event  # the protocol allows nothing else
        return event

    def identify(self, authenticator: Authenticator, token: str) -> CallerPass:
        """Return who the client is. Raises UnauthenticatedError if it must prove that, and has not."""
        certificate = {} if self._engine is None else self._engine.peer_certificate
        return CallerPass(
            CallerProof(
                authenticator,
                self.peer_key,
                token=token,
                certificate=shown_certificate(certificate),
                is_local=self.is_local,
            )
        )

    def open_stream(self) -> SocketStream:
        """Return the connection as a stream, which owns it from now on."""
        if self._engine is None:
            return SocketStream(self.socket, stall_limit_s=STALL_LIMIT_S)
        return TlsStream(self.socket, self._engine, stall_limit_s=STALL_LIMIT_S)

    def _decrypt(self, engine: TlsEngine, buffer: memoryview, count: int) -> int:
        """Go on with TLS, and replace what has come by what the client has written. Return how many bytes that is."""
        engine.feed(buffer[:count])
        if not engine.is_established:
            try:
                engine.shake_hands()
            finally:
                self._send(engine.take_unsent())
        return engine.decrypt_into(buffer)

    def _send(self, data: bytes) -> None:
        """Send a part of the handshake; what the system does not take is sent when it does."""
        rest = self._unsent + data
        if rest:
            try:
                self._unsent = rest[self.socket.send(rest) :]
            except BlockingIOError:
                self._unsent = rest
        self.events = select.EPOLLIN | (select.EPOLLOUT if self._unsent else 0)


def _describe_peer(connection: socket.socket, address: Any) -> str:
    """Return the client's address, for the log."""
    if connection.family == socket.AF_UNIX:
        return f"unix: {peer_credentials(connection)}"
    host, port = address[:2]
    return f"tcp: {host}:{port}"

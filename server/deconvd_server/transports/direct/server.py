"""Serves direct connections, from this host and over TCP, and notices clients that go."""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from deconvd.direct.events import MethodCode
from deconvd.errors import DeconvdError, UnavailableError
from deconvd.wire.status import status_from_error
from deconvd_server.access.authenticator import Authenticator
from deconvd_server.access.server_tls import ServerTls
from deconvd_server.log_handler import REPEAT_KEY
from deconvd_server.resources.accept_loop import Listener
from deconvd_server.resources.fair_shares import FairShares, PeerPlace
from deconvd_server.resources.heartbeat import Heartbeat
from deconvd_server.resources.unix_listener import SideSocket
from deconvd_server.resources.worker_table import WORKERS, ConnectionLoad
from deconvd_server.service.method import RpcMethod
from deconvd_server.transports.direct.connection import DirectConnection
from deconvd_server.transports.direct.greeter import GreetedClient, Greeter
from deconvd_server.transports.direct.last_caller import LastCaller
from deconvd_server.transports.direct.leader_followers import LeaderFollowers
from deconvd_server.transports.direct.transfers import TransferTable
from deconvd_server.transports.observers import Observer

__all__ = ["DirectServer"]

_CONNECTIONS_COUNT: Final = 256
"""How many direct connections there may be. Each brings a thread, which costs little while it waits."""

_RESERVED_CONNECTIONS_COUNT: Final = 32
"""How many of them are for peers that have none: as many as may well come at once while one peer has all the others."""

_ACTIVE_S: Final = 2.0
"""How long a connection is active after its last call. Clients that work make calls more often."""

_RECENT_S: Final = 10.0
"""The same where a client that begins looks for its home: it stays there longer than others pause."""

_TELL_S: Final = 0.05
"""How soon it is told that connections have begun or ended, and how often at most."""

_CHECK_PERIOD_S: Final = 1.0
"""How often idle connections of clients that may no longer call are closed."""

_log = logging.getLogger(__name__)


class DirectServer:
    """Serves direct calls. Each connection has a thread; one more accepts and greets them, and notices clients that go.

    Peers share the connections (`deconvd_server.resources.fair_shares`): when there are too many, one of the peer that
    has most is closed, an idle one if there is one. If nothing can be closed, the new connection is: its client then
    calls by gRPC. A client that may no longer call, since its token was revoked, say, loses its connection: by gRPC it
    hears why.

    Args:
        sides: Sockets that listen for processes of this host. Every process that may open them is served.
        listeners: Sockets that listen for TCP connections. This object closes them, and those of `sides`.
        methods: The methods by their names.
        instance: The server's id.
        authenticator: Says who clients are.
        tls: How connections by TCP are encrypted; None if they are not.
        observers: They are told of every call.
        on_lost: Called with the name of what is lost, if an unforeseen error ends a thread that all need.
    """

    def __init__(
        self,
        sides: Sequence[SideSocket],
        listeners: Sequence[socket.socket],
        methods: Mapping[str, RpcMethod],
        instance: bytes,
        authenticator: Authenticator,
        tls: ServerTls | None,
        observers: Sequence[Observer],
        on_lost: Callable[[str], None],
    ) -> None:
        self._methods = {method: methods[method.name] for method in MethodCode}
        self._instance = instance
        self._observers = observers
        self._last_caller = LastCaller()
        self._lock = threading.Lock()
        self._connections: dict[int, DirectConnection] = {}  # by descriptor
        self._begun_count = 0
        self._is_change_noted = False
        self._shares = FairShares(
            _CONNECTIONS_COUNT, _RESERVED_CONNECTIONS_COUNT, "direct connections"
        )
        self._transfers = TransferTable(self._close_idle)
        self._is_withdrawn = False
        self._is_clean = True  # no call was cut short
        self._listener = Listener(
            "direct connections",
            sides,
            listeners,
            self._greet,
            on_lost,
        )
        self._leaders = LeaderFollowers(self._last_caller, self._call_later, on_lost)
        self._greeter = Greeter(self._listener, authenticator, tls, instance, self._admit)
        self.heartbeat: Heartbeat = Heartbeat(self._listener.call_later)
        if not authenticator.is_open:
            self._listener.call_later(_CHECK_PERIOD_S, self._close_invalid)
        self._thread = threading.Thread(target=self._listener.run, name="direct-calls", daemon=True)
        self._thread.start()

    def withdraw(self) -> None:
        """Take no more calls, and give up the paths. Calls under way go on, and get all their stripes."""
        self._listener.withdraw()
        with self._lock:
            self._is_withdrawn = True
        self._transfers.withdraw()
        self._close_idle()

    def cancel(self) -> None:
        """Cancel the calls under way."""
        for connection in self._all_connections():
            self._is_clean &= connection.is_idle
            connection.cancel()

    def abort(self, error: DeconvdError) -> None:
        """End the calls under way with an error, from another thread: their own may hang for good."""
        failure = status_from_error(error)
        for connection in self._all_connections():
            connection.abort(failure)

    def close(self, timeout_s: float) -> bool:
        """Withdraw, and wait until no call is under way. After `timeout_s`, cancel those that still are.

        Returns:
            Whether no call was cancelled.
        """
        deadline_s = time.monotonic() + timeout_s
        self.withdraw()
        self._transfers.wait_until_complete(timeout_s)
        for connection in self._all_connections():
            connection.close_when_idle()
        for connection in self._all_connections():
            self._is_clean &= connection.ended.wait(max(deadline_s - time.monotonic(), 0))
            connection.cancel()
            connection.ended.wait()
        self._listener.stop()
        self._thread.join()
        self._greeter.close()
        self._listener.close()
        self._leaders.close()
        return self._is_clean

    @property
    def connections_count(self) -> int:
        """How many direct connections there are."""
        return len(self._connections)

    @property
    def active_connections_count(self) -> int:
        """How many of them have a call under way, or had one a moment ago: clients keep to servers with few."""
        return sum(each.was_used_within(_ACTIVE_S) for each in self._all_connections())

    def load(self) -> ConnectionLoad:
        """Return how many have been used of late, and how many there were in all."""
        with self._lock:
            connections, begun_count = list(self._connections.values()), self._begun_count
        recent_count = sum(each.was_used_within(_RECENT_S) for each in connections)
        return ConnectionLoad(recent_count, begun_count)

    def _close_idle(self) -> None:
        """Close the connections that are idle, and others once they are. Those that may become stripes stay."""
        peers_to_come = self._transfers.peers_to_come()
        for connection in self._all_connections():
            if connection.peer_key not in peers_to_come:
                connection.close_when_idle()

    def _all_connections(self) -> list[DirectConnection]:
        with self._lock:
            return list(self._connections.values())

    def _drop_connection(self, connection: DirectConnection) -> None:
        """Cancel the call of a client that has gone, or of a connection that has ended by itself."""
        connection.cancel()
        # last: if `cancel` meets a shortage, it is called again
        self._listener.unwatch(connection.descriptor)

    def _greet(self, connection: socket.socket, address: Any) -> None:
        self._greeter.begin(connection, address)

    def _close_invalid(self) -> None:
        """Close idle connections of clients that may no longer call, before such a client tries to."""
        for connection in self._all_connections():
            if not connection.caller_pass.is_valid():
                connection.close_when_idle()
        self._listener.call_later(_CHECK_PERIOD_S, self._close_invalid)

    def _admit(self, client: GreetedClient) -> None:
        """Give a client a place and a thread, or close its connection."""
        connection = DirectConnection(
            client,
            self._methods,
            self._transfers,
            self._instance,
            self._last_caller,
            self._leaders,
            self._observers,
            self._forget,
        )
        try:
            place = self._shares.take(connection.peer_key, connection.cancel)
        except UnavailableError as error:
            key = {REPEAT_KEY: (__name__, str(error))}
            _log.info("%s is not served directly: %s", client.peer, error, extra=key)
            connection.refuse()
            return
        try:
            self._start_connection(connection, place)
        except (OSError, RuntimeError, MemoryError) as error:  # no threads or descriptors are left
            self._listener.unwatch(connection.descriptor)
            place.free()
            connection.refuse()
            self._listener.pause(error)
        else:
            self._note_change()

    def _start_connection(self, connection: DirectConnection, place: PeerPlace) -> None:
        with self._lock:
            if self._is_withdrawn:
                place.free()
                connection.refuse()
                return
            self._listener.watch(
                connection.descriptor, partial(self._drop_connection, connection), select.EPOLLRDHUP
            )
            self._connections[connection.descriptor] = connection
            try:
                connection.start(place)
            except BaseException:
                del self._connections[connection.descriptor]
                raise
            self._begun_count += 1

    def _forget(self, connection: DirectConnection) -> None:
        with self._lock:
            self._listener.unwatch(connection.descriptor)
            self._connections.pop(connection.descriptor)
        self._note_change()

    def _note_change(self) -> None:
        """Have it told soon that connections have begun or ended: clients that begin get their homes by that."""
        if not self._is_change_noted:
            self._call_later(_TELL_S, self._tell_load)
            self._is_change_noted = True

    def _call_later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Call `action` in `delay_s` seconds, in the thread that accepts connections. Any thread may call this."""
        self._listener.call_soon(partial(self._listener.call_later, delay_s, action))

    def _tell_load(self) -> None:
        self._is_change_noted = False
        WORKERS.tell_load()

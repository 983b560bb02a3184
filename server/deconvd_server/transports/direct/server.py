"""Accepts direct connections, from this host and over TCP, and notices clients that go."""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from deconvd.direct.byte_stream import SocketStream
from deconvd.direct.events import MethodCode
from deconvd.errors import UnavailableError
from deconvd_server.call.context import STALL_LIMIT_S
from deconvd_server.resources.accept_loop import Listener
from deconvd_server.resources.fair_shares import FairShares, PeerPlace
from deconvd_server.resources.peer_identity import peer_key_of_connection
from deconvd_server.resources.unix_listener import SideSocket, peer_credentials
from deconvd_server.service.method import RpcMethod
from deconvd_server.transports.direct.connection import DirectConnection
from deconvd_server.transports.direct.last_caller import LastCaller
from deconvd_server.transports.direct.transfers import TransferTable
from deconvd_server.transports.observers import Observer

__all__ = ["DirectServer"]

_CONNECTIONS_COUNT: Final = 256
"""How many direct connections there may be. Each takes a thread, which costs little while it waits."""

_RESERVED_CONNECTIONS_COUNT: Final = 32
"""How many of them are for peers that have none: as many as may well come at once while one peer has all the others."""

_log = logging.getLogger(__name__)


class DirectServer:
    """Serves direct calls. Each connection has a thread; one more thread accepts them and notices clients that go.

    Peers share the connections (`deconvd_server.resources.fair_shares`): when there are too many, one of the peer that
    has most is closed, an idle one if there is one. If nothing can be closed, the new connection is: its client then
    calls by gRPC.

    Args:
        sides: Sockets that listen for processes of this host. Every process that may open them is served.
        listeners: Sockets that listen for TCP connections. This object closes them, and those of `sides`.
        methods: The methods by their names.
        instance: The server's id.
        observers: They are told of every call.
        on_lost: Called with the name of what is lost, if an unforeseen error ends the thread that accepts connections.
    """

    def __init__(
        self,
        sides: Sequence[SideSocket],
        listeners: Sequence[socket.socket],
        methods: Mapping[str, RpcMethod],
        instance: bytes,
        observers: Sequence[Observer],
        on_lost: Callable[[str], None],
    ) -> None:
        self._methods = {method: methods[method.name] for method in MethodCode}
        self._instance = instance
        self._observers = observers
        self._last_caller = LastCaller()
        self._lock = threading.Lock()
        self._connections: dict[int, DirectConnection] = {}  # by descriptor
        self._shares = FairShares(
            _CONNECTIONS_COUNT, _RESERVED_CONNECTIONS_COUNT, "direct connections"
        )
        self._transfers = TransferTable(self._close_idle)
        self._is_withdrawn = False
        self._is_clean = True  # no call was cut short
        self._listener = Listener("direct connections", sides, listeners, self._accept, on_lost)
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
            connection.thread.join(max(deadline_s - time.monotonic(), 0))
            self._is_clean &= not connection.thread.is_alive()
            connection.cancel()
            connection.thread.join()
        self._listener.stop()
        self._thread.join()
        self._listener.close()
        return self._is_clean

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
        self._listener.unwatch(connection.descriptor)
        connection.cancel()

    def _accept(self, accepted: socket.socket, address: Any) -> None:
        peer = _describe_peer(accepted, address)
        peer_key = peer_key_of_connection(accepted, address)
        connection = DirectConnection(
            SocketStream(accepted, stall_limit_s=STALL_LIMIT_S),
            peer,
            peer_key,
            self._methods,
            self._transfers,
            self._instance,
            self._last_caller,
            self._observers,
            self._forget,
        )
        try:
            place = self._shares.take(peer_key, connection.cancel)
        except UnavailableError as error:
            _log.info("%s is not served directly: %s", peer, error)
            accepted.close()
            return
        try:
            self._start_connection(connection, place)
        except BaseException:
            place.free()
            raise

    def _start_connection(self, connection: DirectConnection, place: PeerPlace) -> None:
        with self._lock:
            if self._is_withdrawn:
                place.free()
                connection.refuse()
                return
            self._listener.watch(
                connection.descriptor, partial(self._drop_connection, connection), select.EPOLLRDHUP
            )
            connection.start(place)
            self._connections[connection.descriptor] = connection

    def _forget(self, connection: DirectConnection) -> None:
        with self._lock:
            self._listener.unwatch(connection.descriptor)
            self._connections.pop(connection.descriptor)


def _describe_peer(connection: socket.socket, address: Any) -> str:
    """Return the client's address, for the log."""
    if connection.family == socket.AF_UNIX:
        return f"unix: {peer_credentials(connection)}"
    host, port = address[:2]
    return f"tcp: {host}:{port}"

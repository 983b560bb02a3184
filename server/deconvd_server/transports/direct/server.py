"""Takes lines for direct calls, from this host and over TCP, and sees who goes. See `deconvd.direct.protocol`."""

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
from deconvd_server.resources.peer_keys import peer_key_of_connection
from deconvd_server.resources.unix_listener import SideSocket, peer_credentials
from deconvd_server.service.method import RpcMethod
from deconvd_server.transports.direct.connection import DirectConnection
from deconvd_server.transports.direct.last_caller import LastCaller
from deconvd_server.transports.observers import Observer

__all__ = ["DirectServer"]

_CONNECTIONS_COUNT: Final = 256
"""Each takes a thread, which costs little while it waits."""

_RESERVED_CONNECTIONS_COUNT: Final = 32
"""For peers that have none: as many as may well come at once, while one peer has all the others."""

_log = logging.getLogger(__name__)


class DirectServer:
    """Serves direct calls: each line in a thread of its own, while one takes new lines and sees who goes.

    Peers share the lines (`deconvd_server.resources.fair_shares`): when there are too many, one of the peer that has
    most gives way, an idle one if there is any. A connection for which none does is closed: its client calls by gRPC.

    Args:
        sides: Listen for processes of this host. All that may open them are served.
        listeners: Sockets that listen for TCP connections. It closes them, and those of `sides`.
        behaviours: What serves each method, by its name.
        instance: The server's id.
        observers: Hear of every call.
        on_lost: Called with what is lost, if an error that was not foreseen ends the thread that takes lines.
    """

    def __init__(
        self,
        sides: Sequence[SideSocket],
        listeners: Sequence[socket.socket],
        behaviours: Mapping[str, RpcMethod],
        instance: bytes,
        observers: Sequence[Observer],
        on_lost: Callable[[str], None],
    ) -> None:
        self._methods = {method: behaviours[method.name] for method in MethodCode}
        self._instance = instance
        self._observers = observers
        self._last_caller = LastCaller()
        self._lock = threading.Lock()
        self._connections: dict[int, DirectConnection] = {}  # by descriptor
        self._shares = FairShares(_CONNECTIONS_COUNT, _RESERVED_CONNECTIONS_COUNT, "direct lines")
        self._is_withdrawn = False
        self._is_clean = True  # no call was cut short
        self._listener = Listener("direct lines", sides, listeners, self._accept, on_lost)
        self._thread = threading.Thread(target=self._listener.run, name="direct-calls", daemon=True)
        self._thread.start()

    def withdraw(self) -> None:
        """Take no more calls, and give up the paths. Calls under way go on."""
        self._listener.withdraw()
        with self._lock:
            self._is_withdrawn = True
        for line in self._all_connections():
            line.close_when_idle()

    def cancel(self) -> None:
        """Cancel the calls under way."""
        for line in self._all_connections():
            self._is_clean &= line.is_idle
            line.cancel()

    def close(self, timeout_s: float) -> bool:
        """Withdraw, and return once no call is under way: after `timeout_s` they are cancelled.

        Returns:
            Whether none was.
        """
        self.withdraw()
        deadline_s = time.monotonic() + timeout_s
        for line in self._all_connections():
            line.thread.join(max(deadline_s - time.monotonic(), 0))
            self._is_clean &= not line.thread.is_alive()
            line.cancel()
            line.thread.join()
        self._listener.stop()
        self._thread.join()
        self._listener.close()
        return self._is_clean

    def _all_connections(self) -> list[DirectConnection]:
        with self._lock:
            return list(self._connections.values())

    def _drop_connection(self, line: DirectConnection) -> None:
        """Cancel the call of a client that has gone, or of a line that has ended by itself."""
        self._listener.unwatch(line.descriptor)
        line.cancel()

    def _accept(self, connection: socket.socket, address: Any) -> None:
        peer = _describe_peer(connection, address)
        counted_by = peer_key_of_connection(connection, address)
        line = DirectConnection(
            SocketStream(connection, stall_limit_s=STALL_LIMIT_S),
            peer,
            counted_by,
            self._methods,
            self._instance,
            self._last_caller,
            self._observers,
            self._forget,
        )
        try:
            place = self._shares.take(counted_by, line.cancel)
        except UnavailableError as error:
            _log.info("%s is not served directly: %s", peer, error)
            connection.close()
            return
        try:
            self._start_connection(line, place)
        except BaseException:
            place.free()
            raise

    def _start_connection(self, line: DirectConnection, place: PeerPlace) -> None:
        with self._lock:
            if self._is_withdrawn:
                place.free()
                line.refuse()
                return
            self._listener.watch(
                line.descriptor, partial(self._drop_connection, line), select.EPOLLRDHUP
            )
            line.start(place)
            self._connections[line.descriptor] = line

    def _forget(self, line: DirectConnection) -> None:
        with self._lock:
            self._listener.unwatch(line.descriptor)
            self._connections.pop(line.descriptor)


def _describe_peer(connection: socket.socket, address: Any) -> str:
    """Return who has connected, for the log."""
    if connection.family == socket.AF_UNIX:
        return f"unix: {peer_credentials(connection)}"
    host, port = address[:2]
    return f"tcp: {host}:{port}"

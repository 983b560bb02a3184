"""A way over TCP that counts what goes over it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import deconvd_client

__all__ = ["CountingProxy", "count_traffic"]

_PIECE_BYTES = 1 << 20


_HOST = "127.0.0.2"
"""Another address of this host's, where the server's own port for direct calls is free if `free_port` has chosen it."""


class CountingProxy:
    """A proxy of a server's TCP ports: what it counts is all that TCP carries, HTTP/2's own frames included.

    Attributes:
        target: What a client connects to; direct calls go through the proxy, too.
        sent_bytes: What came from clients.
        received_bytes: What went back to them.
    """

    def __init__(self, server: str) -> None:
        host, _, port = server.rpartition(":")
        with deconvd_client.connect(server, transport="grpc") as F:
            direct_port = F.server_info().direct_port
        with ExitStack() as stack:  # if another program has the second port
            self._listeners = [
                stack.enter_context(socket.create_server((_HOST, own))) for own in (0, direct_port)
            ]
            stack.pop_all()
        self.target = f"{_HOST}:{self._listeners[0].getsockname()[1]}"
        self.sent_bytes = 0
        self.received_bytes = 0
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        for listener, server_port in zip(self._listeners, (int(port), direct_port), strict=True):
            self._start(self._accept, listener, (host, server_port))

    @property
    def total_bytes(self) -> int:
        """What went both ways."""
        return self.sent_bytes + self.received_bytes

    def cut(self) -> None:
        """Break all connections; new ones are taken."""
        with self._lock:
            for connection in self._sockets:
                with suppress(OSError):  # its other end may have closed it
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Break all connections, and take no more."""
        for listener in self._listeners:
            listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[: len(self._listeners)]:
            thread.join()
        self.cut()
        for thread in self._threads:
            thread.join()

    def _start(self, work: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self, listener: socket.socket, server: tuple[str, int]) -> None:
        with listener, suppress(OSError):  # until it is shut down
            while True:
                client, _ = listener.accept()
                self._start(self._connect, client, server)

    def _connect(self, client: socket.socket, address: tuple[str, int]) -> None:
        no_server = suppress(OSError)
        with client, no_server, socket.create_connection(address) as server:
            pair = {client, server}
            for connection in pair:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets |= pair
            back = self._start(self._carry, server, client, False)
            self._carry(client, server, True)
            back.join()
            with self._lock:
                self._sockets -= pair

    def _carry(self, source: socket.socket, target: socket.socket, is_sent: bool) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        with suppress(OSError):  # it is cut
            while size := source.recv_into(buffer):
                with self._lock:
                    if is_sent:
                        self.sent_bytes += size
                    else:
                        self.received_bytes += size
                target.sendall(buffer[:size])
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@contextmanager
def count_traffic(server: str) -> Iterator[CountingProxy]:
    """Give a counting way to a server, ``host:port``, for the block."""
    wire = CountingProxy(server)
    try:
        yield wire
    finally:
        wire.close()

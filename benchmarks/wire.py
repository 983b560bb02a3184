"""A way over TCP that counts what goes over it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

__all__ = ["Wire", "counted"]

_PIECE_BYTES = 1 << 20


class Wire:
    """A proxy of one TCP address: what it counts is all that TCP carries, HTTP/2's own frames included.

    Attributes:
        target: What a client connects to.
        sent_bytes: What came from clients.
        received_bytes: What went back to them.
    """

    def __init__(self, server: str) -> None:
        host, _, port = server.rpartition(":")
        self._server = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent_bytes = 0
        self.received_bytes = 0
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

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
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self.cut()
        for thread in self._threads:
            thread.join()

    def _start(self, work: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self) -> None:
        with self._listener, suppress(OSError):  # until it is shut down
            while True:
                client, _ = self._listener.accept()
                self._start(self._connect, client)

    def _connect(self, client: socket.socket) -> None:
        no_server = suppress(OSError)
        with client, no_server, socket.create_connection(self._server) as server:
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
def counted(server: str) -> Iterator[Wire]:
    """Give a counting way to a server, ``host:port``, for the block."""
    wire = Wire(server)
    try:
        yield wire
    finally:
        wire.close()

"""A long link: a proxy that accepts connections at once and holds back each byte for a fixed time."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

import deconvd_client

__all__ = ["DelayProxy", "PassedConnection", "long_link"]

PROXY_HOST: Final = "127.0.0.2"
"""Another address of this host, where the ports of the server are free if `free_port` has chosen them."""

_PIECE_BYTES: Final = 1 << 20


@dataclass
class PassedConnection:
    """A connection that goes through a proxy.

    Attributes:
        port: The port of the server.
        turns: Which sides have sent, "up" (the client) and "down" (the server), without repetitions.
        sent_bytes: What the client has sent.
    """

    port: int
    turns: list[str] = field(default_factory=list)
    sent_bytes: int = 0


class DelayProxy:
    """Passes on what it gets on ports of `PROXY_HOST` to the same ports of a server. It runs in a thread of its own.

    There is no handshake to wait for, no slow start, and no limit on the rate or on the bytes on their way.

    Attributes:
        connections: All connections that there were, in their order.

    Args:
        host: The server's.
        ports: The server's, all of them.
        delay_s: How long it holds back what it gets, in each direction.
    """

    def __init__(self, host: str, ports: Sequence[int], delay_s: float) -> None:
        self.connections: list[PassedConnection] = []
        self._host = host
        self._delay_s = delay_s
        with ExitStack() as stack:  # if another program has one of the ports
            self._listeners = [
                stack.enter_context(socket.create_server((PROXY_HOST, port), backlog=128))
                for port in ports
            ]
            stack.pop_all()
        self._ends: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._thread.start()

    def close(self) -> None:
        """Break all connections, and accept no more."""
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self._loop.close()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for listener in self._listeners:
                listener.setblocking(False)
                tasks.create_task(self._accept(listener, tasks))
            await self._end.wait()
            for listener in self._listeners:
                listener.shutdown(socket.SHUT_RDWR)
            for end in self._ends:
                end.transport.abort()
        for listener in self._listeners:
            listener.close()

    async def _accept(self, listener: socket.socket, tasks: asyncio.TaskGroup) -> None:
        """Take connections until the listener is shut down.

        An asyncio server that is closed amid this would leave a connection open.
        """
        with suppress(OSError):
            while True:
                accepted, _ = await self._loop.sock_accept(listener)
                near, back = await asyncio.open_connection(sock=accepted, limit=_PIECE_BYTES)
                tasks.create_task(self._pass_on(near, back))

    async def _pass_on(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        port = back.get_extra_info("sockname")[1]
        connection = PassedConnection(port)
        self.connections.append(connection)
        ends = {back}
        self._ends.add(back)
        try:
            with suppress(OSError):  # one end has gone, so the other goes too
                far, forth = await asyncio.open_connection(self._host, port, limit=_PIECE_BYTES)
                ends.add(forth)
                self._ends.add(forth)
                for end in ends:  # asyncio forgets this for sockets that it did not make
                    options = socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
                    end.get_extra_info("socket").setsockopt(*options)
                if self._end.is_set():
                    return
                await asyncio.gather(
                    self._carry("up", near, forth, connection),
                    self._carry("down", far, back, connection),
                )
        finally:
            self._ends -= ends
            for end in ends:
                end.close()
            for end in ends:
                with suppress(OSError):  # the loop must not end before it is closed
                    await end.wait_closed()

    async def _carry(
        self,
        side: str,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        connection: PassedConnection,
    ) -> None:
        held: deque[bytes] = deque()
        passed_on = asyncio.Event()

        def release() -> None:
            """Send the oldest piece. The empty piece at the end closes this direction."""
            piece = held.popleft()
            if piece:
                target.write(piece)
                return
            with suppress(OSError):  # the other end has gone
                target.write_eof()
            passed_on.set()

        while not passed_on.is_set():
            piece = await source.read(_PIECE_BYTES)
            if piece and connection.turns[-1:] != [side]:
                connection.turns.append(side)
            if side == "up":
                connection.sent_bytes += len(piece)
            held.append(piece)
            self._loop.call_later(self._delay_s, release)
            if not piece:
                await passed_on.wait()


@contextmanager
def long_link(server: str, round_trip_s: float) -> Iterator[tuple[str, DelayProxy]]:
    """Have a long link to a server of deconvd for the block; give the target at its near end, and the proxy.

    Direct calls go through the link, too. The server must not listen on a Unix socket of this host.
    """
    host, _, port = server.rpartition(":")
    with deconvd_client.connect(server, transport="grpc") as F:
        direct_port = F.server_info().direct_port
    ports = [int(port), direct_port] if direct_port else [int(port)]
    proxy = DelayProxy(host, ports, round_trip_s / 2)
    try:
        yield f"{PROXY_HOST}:{port}", proxy
    finally:
        proxy.close()

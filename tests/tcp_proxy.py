"""A TCP proxy in a thread of its own. Its subclasses say what becomes of the bytes that go through it."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import suppress
from enum import Enum
from typing import NoReturn, TypeAlias

__all__ = ["Direction", "Ends", "Fault", "Pump", "TcpProxy", "cut_line"]

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, and no time to linger


class Direction(Enum):
    """A direction."""

    UP = "to the server"
    DOWN = "to the client"


class Fault(Enum):
    """What happens to a connection."""

    RESET = "reset"
    CLOSE = "closed"
    HANG = "hung"


Ends: TypeAlias = set[asyncio.StreamWriter]
"""The ends of one connection's two halves: towards the client, and towards the server."""

Pump: TypeAlias = Callable[
    [Direction, asyncio.StreamReader, asyncio.StreamWriter, Ends], Awaitable[None]
]
"""Passes on what one end sends, until it sends no more. An OSError ends the connection."""


class TcpProxy(ABC):
    """A TCP server that passes on what it gets.

    Attributes:
        target: Where clients find it.
        connections_count: How many there were.

    Args:
        target: Where it passes things on to: ``host:port``.
        host: Where it listens.
        own_port: Its port; 0 for any free one.
        source: The address that it connects from; None for any.
    """

    def __init__(
        self, target: str, host: str = "127.0.0.1", own_port: int = 0, source: str | None = None
    ) -> None:
        self._source = (source, 0) if source else None
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self.connections_count = 0
        self._listener = socket.create_server((host, own_port))
        self.target = f"{host}:{self._listener.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._ends: Ends = set()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._thread.start()

    def close(self) -> None:
        """Close it, and what goes through it."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self._loop.close()

    @abstractmethod
    def _make_pump(self) -> Pump:
        """Return what passes on the bytes of a new connection, in both directions."""

    async def _run(self) -> None:
        with self._listener:
            self._listener.setblocking(False)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._accept(tasks))
                await self._ended.wait()
                self._listener.shutdown(socket.SHUT_RDWR)
                for end in self._ends:
                    _reset(end)

    async def _accept(self, tasks: asyncio.TaskGroup) -> None:
        """Take connections until the listener is shut down.

        An asyncio server that is closed amid this would leave a connection open.
        """
        with suppress(OSError):
            while True:
                accepted, _ = await self._loop.sock_accept(self._listener)
                tasks.create_task(self._relay(*await asyncio.open_connection(sock=accepted)))

    async def _relay(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        pump = self._make_pump()
        self.connections_count += 1
        ends = {back}
        with suppress(OSError):  # one end has gone, so the other goes too
            try:
                far, forth = await asyncio.open_connection(
                    self._host, self._port, local_addr=self._source
                )
                ends.add(forth)
                self._ends |= ends
                if self._ended.is_set():
                    raise ConnectionAbortedError("the proxy is being closed")
                await asyncio.gather(
                    pump(Direction.UP, near, forth, ends), pump(Direction.DOWN, far, back, ends)
                )
            finally:
                for end in ends:
                    end.close()
                # an end with bytes that its peer has not read is closed only after them, or by a reset
                await asyncio.gather(*(end.wait_closed() for end in ends), return_exceptions=True)
                self._ends -= ends


def cut_line(fault: Fault, ends: Ends) -> NoReturn:
    """Reset or close a connection. Raises ConnectionAbortedError, which ends its pump."""
    for end in ends:
        if fault is Fault.RESET:
            _reset(end)
        end.close()
    raise ConnectionAbortedError("the line is cut")


def _reset(end: asyncio.StreamWriter) -> None:
    """Close a connection without waiting for what is on its way."""
    with suppress(OSError):  # it is closed already
        end.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE
        )
    end.transport.abort()

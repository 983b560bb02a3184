"""Bad lines: a proxy before a TCP server that splits, slows, holds up and cuts what goes through it."""

from __future__ import annotations

import asyncio
import math
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from itertools import cycle

from tests.http2 import frame

__all__ = [
    "CLEAN",
    "Direction",
    "Fault",
    "FaultProxy",
    "LinkConditions",
    "faulty_proxy",
    "unresponsive_server",
]

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, and no time to linger

_INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 4, 5  # of HTTP/2's settings
_ALL_WINDOW_BYTES = 2**31 - 1


class Direction(Enum):
    """A direction."""

    UP = "to the server"
    DOWN = "to the client"


class Fault(Enum):
    """What happens to a connection."""

    RESET = "reset"
    CLOSE = "closed"
    HANG = "hung"


@dataclass(frozen=True)
class LinkConditions:
    """How one connection behaves.

    Attributes:
        pieces: Into how many bytes what goes through is split at most, in turn.
        pause_s: How long each piece is held up.
        fault: What happens to it, if anything, after so many bytes on their way.
        hang_s: For how long nothing goes that way once it hangs; None for ever.
    """

    pieces: tuple[int, ...] = (1 << 16,)
    pause_s: float = 0.0
    fault: Fault | None = None
    direction: Direction = Direction.UP
    after_bytes: int = 0
    hang_s: float | None = None


CLEAN = LinkConditions()


class FaultProxy:
    """A TCP server that passes on what it gets. It runs in a thread of its own.

    Attributes:
        target: Where clients find it.
        connections_count: How many there were.
        faults_count: How many of them had their fault.

    Args:
        target: Where it passes things on to: ``host:port``.
        lines: How the first connections behave, in turn, and then all others, as the last.
        host: Where it listens.
        own_port: Its port; 0 for any free one.
        source: The address that it connects from; None for any.
    """

    def __init__(
        self,
        target: str,
        lines: tuple[LinkConditions, ...],
        host: str,
        own_port: int,
        source: str | None = None,
    ) -> None:
        self._source = (source, 0) if source else None
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._lines = lines
        self.connections_count = 0
        self.faults_count = 0
        self._listener = socket.create_server((host, own_port))
        self.target = f"{host}:{self._listener.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._ends: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._thread.start()

    def close(self) -> None:
        """Close it, and what goes through it."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self._loop.close()

    async def _run(self) -> None:
        server = await asyncio.start_server(self._relay, sock=self._listener)
        await self._ended.wait()
        server.close()
        for end in self._ends:
            _reset(end)
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)

    async def _relay(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        line = self._lines[min(self.connections_count, len(self._lines) - 1)]
        self.connections_count += 1
        with suppress(OSError):  # one end has gone, so the other goes too
            far, forth = await asyncio.open_connection(
                self._host, self._port, local_addr=self._source
            )
            ends = {back, forth}
            self._ends |= ends
            try:
                await asyncio.gather(
                    self._pump(line, Direction.UP, near, forth, ends),
                    self._pump(line, Direction.DOWN, far, back, ends),
                )
            finally:
                self._ends -= ends
                for end in ends:
                    end.close()

    async def _pump(
        self,
        line: LinkConditions,
        way: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        ends: set[asyncio.StreamWriter],
    ) -> None:
        sizes = cycle(line.pieces)
        until_fault_bytes = line.after_bytes if line.fault and line.direction is way else math.inf
        while data := await reader.read(next(sizes)):
            if line.pause_s:
                await asyncio.sleep(line.pause_s)
            if until_fault_bytes <= len(data):
                before, data = data[: int(until_fault_bytes)], data[int(until_fault_bytes) :]
                writer.write(before)
                await self._inject_fault(line, ends)
                until_fault_bytes = math.inf
            until_fault_bytes -= len(data)
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    async def _inject_fault(self, line: LinkConditions, ends: set[asyncio.StreamWriter]) -> None:
        self.faults_count += 1
        if line.fault is Fault.HANG:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), line.hang_s)
            return
        for end in ends:
            if line.fault is Fault.RESET:
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


@contextmanager
def faulty_proxy(
    target: str,
    *lines: LinkConditions,
    host: str = "127.0.0.1",
    own_port: int = 0,
    source: str | None = None,
) -> Iterator[FaultProxy]:
    """Run a proxy before a server for the block."""
    proxy = FaultProxy(target, lines, host, own_port, source)
    try:
        yield proxy
    finally:
        proxy.close()


@contextmanager
def unresponsive_server() -> Iterator[str]:
    """Run a server that allows its first client to send anything, and reads nothing; others it does not let in.

    What that client writes fills the kernel's buffers and waits there.
    """
    settings = struct.pack(
        ">HIHI", _INITIAL_WINDOW_SIZE, _ALL_WINDOW_BYTES, _MAX_FRAME_SIZE, (1 << 24) - 1
    )
    window_update = struct.pack(">I", _ALL_WINDOW_BYTES - 65535)
    accepted: list[socket.socket] = []

    def accept_one() -> None:
        with listener:
            connection, _ = listener.accept()
        accepted.append(connection)
        connection.sendall(frame(4, 0, 0, settings) + frame(8, 0, 0, window_update))

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = threading.Thread(target=accept_one)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.join()
        for connection in accepted:
            connection.close()

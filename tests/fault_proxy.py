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
from functools import partial
from itertools import cycle

from tests.http2 import frame
from tests.tcp_proxy import Direction, Ends, Fault, Pump, TcpProxy, cut_line

__all__ = [
    "CLEAN",
    "Direction",
    "Fault",
    "FaultProxy",
    "LinkConditions",
    "faulty_proxy",
    "unresponsive_server",
]

_INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 4, 5  # of HTTP/2's settings
_ALL_WINDOW_BYTES = 2**31 - 1


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


class FaultProxy(TcpProxy):
    """A proxy whose lines split, slow, hold up and cut what goes through them.

    Attributes:
        faults_count: How many of its connections had their fault.

    Args:
        target, host, own_port, source: See `TcpProxy`.
        lines: How the first connections behave, in turn, and then all others, as the last.
    """

    def __init__(
        self,
        target: str,
        lines: tuple[LinkConditions, ...],
        host: str,
        own_port: int,
        source: str | None = None,
    ) -> None:
        self._lines = lines
        self.faults_count = 0
        super().__init__(target, host, own_port, source)

    def _make_pump(self) -> Pump:
        line = self._lines[min(self.connections_count, len(self._lines) - 1)]
        return partial(self._pump, line)

    async def _pump(
        self,
        line: LinkConditions,
        way: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        ends: Ends,
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

    async def _inject_fault(self, line: LinkConditions, ends: Ends) -> None:
        assert line.fault is not None
        self.faults_count += 1
        if line.fault is not Fault.HANG:
            cut_line(line.fault, ends)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), line.hang_s)


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

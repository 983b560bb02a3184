"""A proxy for direct connections that knows their frames: it cuts or holds up a striped call at a chosen place.

A place is a frame of the call, and a part of it: "half of the third piece to the server", say, or "the begin of the
first piece from the server on stripe 1". What goes by the other lines of the call goes on.
"""

from __future__ import annotations

import asyncio
import math
from asyncio import IncompleteReadError
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from deconvd.direct.events import (
    FRAME_HEAD,
    FRAME_HEAD_BYTES,
    FrameKind,
    StripedCallHead,
    StripeHead,
)
from tests.tcp_proxy import Direction, Ends, Fault, Pump, TcpProxy, cut_line

__all__ = ["ANY_STRIPE", "CONTROL", "Disturbance", "Spot", "StripeProxy", "stripe_proxy"]

ANY_STRIPE = -1
"""In place of a stripe's number: whichever stripe has the frame."""

CONTROL = -2
"""In place of a stripe's number: the control connection."""

_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Spot:
    """A frame of a striped call.

    Attributes:
        way: In which direction it goes.
        kind: Its kind.
        number: Which of the call's frames of that kind and direction it is, from 0: of those of one stripe if `stripe`
            says which, else of those of all stripes.
        stripe: The stripe that has it: 0 is that whose STRIPE frame comes first. Or `CONTROL`, or `ANY_STRIPE`.
    """

    way: Direction
    kind: FrameKind
    number: int = 0
    stripe: int = ANY_STRIPE


@dataclass(frozen=True)
class Disturbance:
    """What happens, once, at a place.

    Attributes:
        spot: The frame.
        part: How much of the frame goes through first, from 0 to 1.
        fault: What happens to its line then.
        until: If the line hangs: the frame of the same call that must have gone through before the line goes on. None
            for ever, or until `StripeProxy.release`.
        pause_s: How much longer the line hangs after that frame, so that the server gets it first.
    """

    spot: Spot
    part: float = 0.0
    fault: Fault = Fault.RESET
    until: Spot | None = None
    pause_s: float = 0.05


@dataclass
class _StripedCall:
    """A striped call, as it is seen by the proxy.

    Attributes:
        stripes_count: How many stripes have come.
        counts: How many frames of each kind have begun on each stripe, and on all of them.
        gone: The frames that have gone through.
        moved: Set when one has, and made anew.
    """

    stripes_count: int = 0
    counts: Counter[tuple[Direction, FrameKind, int]] = field(default_factory=Counter)
    gone: set[Spot] = field(default_factory=set)

    def note_begin(self, way: Direction, kind: FrameKind, stripe: int) -> list[Spot]:
        """Count a frame, and return what it may be called."""
        stripes = [stripe] if stripe == CONTROL else [stripe, ANY_STRIPE]
        spots = [Spot(way, kind, self.counts[way, kind, one], one) for one in stripes]
        self.counts.update((way, kind, one) for one in stripes)
        return spots


@dataclass
class _Line:
    """A connection: what call it belongs to now, and as what. None between calls, and in others than striped ones."""

    call: _StripedCall | None = None
    stripe: int = CONTROL


class StripeProxy(TcpProxy):
    """A proxy that disturbs striped calls.

    Attributes:
        disturbances: What is still to happen: each happens once.
        faults_count: How often one happened.
        stripes_counts: How many stripes each striped call had so far, in the order of their first frames.

    Args:
        target, host, own_port: See `TcpProxy`.
    """

    def __init__(
        self, target: str, disturbances: Sequence[Disturbance], host: str, own_port: int
    ) -> None:
        self.disturbances = list(disturbances)
        self.faults_count = 0
        self._calls: dict[bytes, _StripedCall] = {}  # by transfer id
        self._has_moved = asyncio.Event()  # a new one after each frame
        self._is_released = False
        super().__init__(target, host, own_port)

    @property
    def stripes_counts(self) -> list[int]:
        """See the class."""
        return [call.stripes_count for call in tuple(self._calls.values())]

    def release(self) -> None:
        """Let lines go on that hang, now and later."""
        self._loop.call_soon_threadsafe(self._release)

    def close(self) -> None:
        """See `TcpProxy`."""
        self.release()
        super().close()

    def _release(self) -> None:
        self._is_released = True
        self._wake()

    def _wake(self) -> None:
        self._has_moved.set()
        self._has_moved = asyncio.Event()

    def _make_pump(self) -> Pump:
        return partial(self._pump, _Line())

    async def _pump(
        self,
        line: _Line,
        way: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        ends: Ends,
    ) -> None:
        try:
            while True:
                await self._pass_frame(line, way, reader, writer, ends)
        except IncompleteReadError as end:
            writer.write(end.partial)
            writer.write_eof()

    async def _pass_frame(
        self,
        line: _Line,
        way: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        ends: Ends,
    ) -> None:
        head = await reader.readexactly(FRAME_HEAD_BYTES)
        number, size_bytes = FRAME_HEAD.unpack(head)
        kind = FrameKind(number)
        if kind in (FrameKind.STRIPED_CALL, FrameKind.STRIPE, FrameKind.CALL):
            payload = await _read_payload(reader, head, size_bytes)
            self._join(line, kind, payload)
            head, size_bytes = head + payload, 0
        spots = line.call.note_begin(way, kind, line.stripe) if line.call else []
        disturbance = self._take_disturbance(spots)
        until_fault_bytes = disturbance.part * (len(head) + size_bytes) if disturbance else math.inf
        async for data in _chunks(reader, head, size_bytes):
            if disturbance is not None and until_fault_bytes <= len(data):
                before, data = data[: int(until_fault_bytes)], data[int(until_fault_bytes) :]
                writer.write(before)
                await self._disturb(disturbance, line, ends)
                disturbance = None
            until_fault_bytes -= len(data)
            writer.write(data)
            await writer.drain()
        if line.call:
            line.call.gone.update(spots)
            self._wake()

    def _join(self, line: _Line, kind: FrameKind, payload: bytes) -> None:
        """Note what a line is from its call's first frame on."""
        line.call = None
        if kind is FrameKind.STRIPED_CALL:
            line.call = self._call(StripedCallHead.parse(payload).transfer)
            line.stripe = CONTROL
        elif kind is FrameKind.STRIPE:
            line.call = self._call(StripeHead.parse(payload).transfer)
            line.stripe = line.call.stripes_count
            line.call.stripes_count += 1

    def _call(self, transfer: bytes) -> _StripedCall:
        return self._calls.setdefault(transfer, _StripedCall())

    def _take_disturbance(self, spots: Sequence[Spot]) -> Disturbance | None:
        for disturbance in self.disturbances:
            if disturbance.spot in spots:
                self.disturbances.remove(disturbance)
                return disturbance
        return None

    async def _disturb(self, disturbance: Disturbance, line: _Line, ends: Ends) -> None:
        self.faults_count += 1
        if disturbance.fault is not Fault.HANG:
            cut_line(disturbance.fault, ends)
        assert line.call is not None
        while not (self._is_released or disturbance.until in line.call.gone):
            await self._has_moved.wait()
        await asyncio.sleep(disturbance.pause_s)


async def _read_payload(reader: asyncio.StreamReader, head: bytes, size_bytes: int) -> bytes:
    try:
        return await reader.readexactly(size_bytes)
    except IncompleteReadError as end:
        raise IncompleteReadError(head + end.partial, size_bytes) from None


async def _chunks(
    reader: asyncio.StreamReader, head: bytes, size_bytes: int
) -> AsyncIterator[bytes]:
    """Yield a frame: its head, which was read, and the rest as it comes."""
    yield head
    while size_bytes:
        data = await reader.read(min(size_bytes, _CHUNK_BYTES))
        if not data:
            raise IncompleteReadError(b"", size_bytes)
        size_bytes -= len(data)
        yield data


@contextmanager
def stripe_proxy(
    target: str, *disturbances: Disturbance, host: str = "127.0.0.1", own_port: int = 0
) -> Iterator[StripeProxy]:
    """Run a proxy before a server's port for direct connections for the block."""
    proxy = StripeProxy(target, disturbances, host, own_port)
    try:
        yield proxy
    finally:
        proxy.close()

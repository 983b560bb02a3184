"""Copies between arrays and the card: by itself where it reaches them, else through a ring of pinned buffers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait

import numpy as np

from deconvd.model.dtypes import Array
from deconvd_server.device.cuda.api.host_memory import HostMemory
from deconvd_server.device.cuda.api.runtime import (
    Bytes,
    Event,
    PinnedBuffer,
    Stream,
    download,
    upload,
)

__all__ = ["Staging", "bytes_of"]

_HAND_OVER_BYTES = 1 << 20
"""What one thread copies in the time that it takes to hand the copy to another, and to wait for that."""


class _Slot:
    """A pinned buffer; the event behind the card's last copy, and the host's last copy."""

    def __init__(self, buffer: Bytes) -> None:
        self.buffer = buffer
        self.card = Event()
        self.host: Future[None] | None = None

    def settle(self) -> None:
        """Return when neither the host nor the card uses the buffer."""
        if self.host is not None:
            self.host.result()
            self.host = None
        self.card.wait()


class Staging:
    """A ring of pinned buffers: the host fills or empties some while the card copies others.

    One thread alone copies a tenth of what the card can take, so large arrays are copied by helpers.
    Serves one stream, and one thread at a time.

    Args:
        helpers: Who copies within the host.
        host_memory: What the card reaches by itself.
        slots_count: Buffers in the ring.
        slot_bytes: Size of each.
    """

    def __init__(
        self,
        stream: Stream,
        helpers: Executor,
        host_memory: HostMemory,
        *,
        slots_count: int,
        slot_bytes: int,
    ) -> None:
        self._stream = stream
        self._helpers = helpers
        self._host_memory = host_memory
        self._slot_bytes = slot_bytes
        parts = np.split(PinnedBuffer(slots_count * slot_bytes).bytes, slots_count)
        self._ring = deque(_Slot(part) for part in parts)

    def upload(self, source: Array, target: int, check: Callable[[], None]) -> None:
        """Enqueue a copy of an array to the card, to be read until the stream has been waited for.

        Args:
            source: Of any strides.
            target: Address on the card.
            check: Called before each part; what it raises ends the copy.
        """
        if self._host_memory.holds(source):
            upload(target, bytes_of(source), self._stream.pointer)
            return
        filling: deque[tuple[_Slot, Bytes, int]] = deque()
        try:
            for offset, part in self._parts(bytes_of(source)):
                if len(filling) == len(self._ring):
                    self._send(*filling.popleft())
                check()
                slot = self._next()
                staged = slot.buffer[: part.size]
                slot.host = self._copied(staged, part)
                filling.append((slot, staged, target + offset))
            while filling:
                self._send(*filling.popleft())
        finally:
            self._settle()

    def download(self, source: int, target: Array, check: Callable[[], None]) -> None:
        """Copy from the card to a C-contiguous array, which is there once the stream has been waited for.

        Args:
            source: Address on the card.
            check: As for `upload`.
        """
        if self._host_memory.holds(target):
            download(bytes_of(target), source, self._stream.pointer)
            return
        arriving: deque[tuple[_Slot, Bytes]] = deque()
        try:
            for offset, part in self._parts(bytes_of(target)):
                if len(arriving) == len(self._ring) // 2:
                    check()
                    self._land(*arriving.popleft())
                slot = self._next()
                download(slot.buffer[: part.size], source + offset, self._stream.pointer)
                slot.card.record(self._stream.pointer)
                arriving.append((slot, part))
            while arriving:
                self._land(*arriving.popleft())
        finally:
            self._settle()

    def _send(self, slot: _Slot, staged: Bytes, target: int) -> None:
        if slot.host is not None:
            slot.host.result()
        upload(target, staged, self._stream.pointer)
        slot.card.record(self._stream.pointer)

    def _land(self, slot: _Slot, target: Bytes) -> None:
        slot.card.wait()
        slot.host = self._copied(target, slot.buffer[: target.size])

    def _copied(self, target: Bytes, source: Bytes) -> Future[None] | None:
        """Copy within the host; return what tells when that is done, None if it is."""
        if target.size > _HAND_OVER_BYTES:
            return self._helpers.submit(np.copyto, target, source)
        np.copyto(target, source)
        return None

    def _next(self) -> _Slot:
        """Return the slot that was used longest ago, once nobody uses it any more."""
        self._ring.rotate(-1)
        slot = self._ring[-1]
        slot.settle()
        return slot

    def _settle(self) -> None:
        """Return when no helper touches a caller's array any more."""
        wait([slot.host for slot in self._ring if slot.host is not None])

    def _parts(self, whole: Bytes) -> Iterator[tuple[int, Bytes]]:
        for offset in range(0, whole.size, self._slot_bytes):
            yield offset, whole[offset : offset + self._slot_bytes]


def bytes_of(array: Array) -> Bytes:
    """Return an array's elements in order as bytes: a view of it, if it is C-contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)

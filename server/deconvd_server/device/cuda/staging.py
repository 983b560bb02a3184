"""Copies between a caller's arrays and the card, through a fixed ring of pinned host buffers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from deconvd.tensor import Array
from deconvd_server.device.cuda.runtime import (
    Bytes,
    Event,
    PinnedBuffer,
    Stream,
    download,
    upload,
)

__all__ = ["Staging", "bytes_of"]


class _Slot:
    """A pinned buffer, and the event behind its last copy."""

    def __init__(self, buffer: Bytes) -> None:
        self.buffer = buffer
        self.copied = Event()


class Staging:
    """A ring of pinned buffers: the host fills one while the card empties another.

    Serves one stream, and one thread at a time.

    Args:
        slots_count: Buffers in the ring.
        slot_bytes: Size of each.
    """

    def __init__(self, stream: Stream, *, slots_count: int, slot_bytes: int) -> None:
        self._stream = stream
        self._memory = PinnedBuffer(slots_count * slot_bytes)
        self._slot_bytes = slot_bytes
        parts = np.split(self._memory.bytes, slots_count)
        self._ring = deque(_Slot(part) for part in parts)

    def upload(self, source: Array, target: int, check: Callable[[], None]) -> None:
        """Enqueue a copy of an array to the card; the array has been read when this returns.

        Args:
            source: Of any strides.
            target: Address on the card.
            check: Called before each part; what it raises ends the copy.
        """
        for offset, part in self._parts(bytes_of(source)):
            check()
            slot = self._next()
            staged = slot.buffer[: part.size]
            np.copyto(staged, part)
            upload(target + offset, staged, self._stream.pointer)
            slot.copied.record(self._stream.pointer)

    def download(self, source: int, target: Array, check: Callable[[], None]) -> None:
        """Copy from the card to a C-contiguous array, and return when it is there.

        Args:
            source: Address on the card.
            check: As for `upload`.
        """
        under_way: deque[tuple[_Slot, Bytes]] = deque()
        for offset, part in self._parts(bytes_of(target)):
            if len(under_way) == len(self._ring):
                check()
                _land(*under_way.popleft())
            slot = self._next()
            download(slot.buffer[: part.size], source + offset, self._stream.pointer)
            slot.copied.record(self._stream.pointer)
            under_way.append((slot, part))
        while under_way:
            _land(*under_way.popleft())

    def _next(self) -> _Slot:
        """Return the slot that was used longest ago, once the card is done with it."""
        self._ring.rotate(-1)
        slot = self._ring[-1]
        slot.copied.wait()
        return slot

    def _parts(self, whole: Bytes) -> Iterator[tuple[int, Bytes]]:
        for offset in range(0, whole.size, self._slot_bytes):
            yield offset, whole[offset : offset + self._slot_bytes]


def bytes_of(array: Array) -> Bytes:
    """Return an array's elements in order as bytes: a view of it, if it is C-contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _land(slot: _Slot, target: Bytes) -> None:
    slot.copied.wait()
    np.copyto(target, slot.buffer[: target.size])

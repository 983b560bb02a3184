"""Copies between arrays and the card: directly where the card reaches them, else through a ring of pinned buffers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait

import numpy as np

from deconvd.model.dtypes import Array
from deconvd_server.device.cuda.api.host_memory import RegisteredMemory
from deconvd_server.device.cuda.api.runtime import (
    Bytes,
    Event,
    PinnedBuffer,
    Stream,
    download,
    upload,
)

__all__ = ["Staging", "bytes_of"]

_BACKGROUND_COPY_BYTES = 1 << 20
"""The calling thread copies this much in the time that it takes to hand a copy to another thread and wait for it."""


class _PinnedSlot:
    """A pinned buffer of the ring.

    Attributes:
        card_copy: The event behind the card's last copy from or to the buffer.
        host_copy: The host's last copy, if a helper makes it.
    """

    def __init__(self, buffer: Bytes) -> None:
        self.buffer = buffer
        self.card_copy = Event()
        self.host_copy: Future[None] | None = None

    def wait_idle(self) -> None:
        """Return once neither the host nor the card uses the buffer."""
        if self.host_copy is not None:
            self.host_copy.result()
            self.host_copy = None
        self.card_copy.wait()


class Staging:
    """A ring of pinned buffers. The host fills or empties some while the card copies others.

    An upload:

        array ==helpers==> slot 2, slot 3     slot 0, slot 1 ==card==> device memory
                           (host_copy)        (card_copy)

    One thread copies at a tenth of the bus's speed, so helpers copy large arrays. Serves one stream, and one thread
    at a time.

    Args:
        helpers: Threads that copy within the host.
        host_memory: The memory that the card reaches by itself.
        slots_count: Buffers in the ring.
        slot_bytes: Size of each.
    """

    def __init__(
        self,
        stream: Stream,
        helpers: Executor,
        host_memory: RegisteredMemory,
        *,
        slots_count: int,
        slot_bytes: int,
    ) -> None:
        self._stream = stream
        self._helpers = helpers
        self._host_memory = host_memory
        self._slot_bytes = slot_bytes
        parts = np.split(PinnedBuffer(slots_count * slot_bytes).bytes, slots_count)
        self._ring = deque(_PinnedSlot(part) for part in parts)

    def upload(self, source: Array, target: int, check: Callable[[], None]) -> None:
        """Enqueue a copy of an array to the card. The array must not change until the stream has been waited for.

        Args:
            source: Of any strides.
            target: Address on the card.
            check: Called before each part; an error that it raises ends the copy.
        """
        if self._host_memory.holds(source):
            upload(target, bytes_of(source), self._stream.pointer)
            return
        filling: deque[tuple[_PinnedSlot, Bytes, int]] = deque()
        try:
            for offset, part in self._parts(bytes_of(source)):
                if len(filling) == len(self._ring):
                    # The oldest slot is the next to be filled again, so its copy to the card comes first.
                    self._send(*filling.popleft())
                check()
                slot = self._next_slot()
                staged = slot.buffer[: part.size]
                slot.host_copy = self._start_copy(staged, part)
                filling.append((slot, staged, target + offset))
            while filling:
                self._send(*filling.popleft())
        finally:
            self._wait_helpers()

    def download(self, source: int, target: Array, check: Callable[[], None]) -> None:
        """Copy from the card to a C-contiguous array. It is complete once the stream has been waited for.

        Args:
            source: Address on the card.
            check: As for `upload`.
        """
        if self._host_memory.holds(target):
            download(bytes_of(target), source, self._stream.pointer)
            return
        arriving: deque[tuple[_PinnedSlot, Bytes]] = deque()
        try:
            for offset, part in self._parts(bytes_of(target)):
                if len(arriving) == len(self._ring) // 2:
                    # The card fills one half of the ring while helpers empty the other.
                    check()
                    self._copy_out(*arriving.popleft())
                slot = self._next_slot()
                download(slot.buffer[: part.size], source + offset, self._stream.pointer)
                slot.card_copy.record(self._stream.pointer)
                arriving.append((slot, part))
            while arriving:
                self._copy_out(*arriving.popleft())
        finally:
            self._wait_helpers()

    def _send(self, slot: _PinnedSlot, staged: Bytes, target: int) -> None:
        if slot.host_copy is not None:
            slot.host_copy.result()  # a helper must have filled the buffer
        upload(target, staged, self._stream.pointer)
        slot.card_copy.record(
            self._stream.pointer
        )  # `wait_idle` waits for it before the buffer is filled again

    def _copy_out(self, slot: _PinnedSlot, target: Bytes) -> None:
        slot.card_copy.wait()  # the card must have filled the buffer
        slot.host_copy = self._start_copy(target, slot.buffer[: target.size])

    def _start_copy(self, target: Bytes, source: Bytes) -> Future[None] | None:
        """Copy within the host. Return the future of a helper's copy; None if the copy is done."""
        if target.size > _BACKGROUND_COPY_BYTES:
            return self._helpers.submit(np.copyto, target, source)
        np.copyto(target, source)
        return None

    def _next_slot(self) -> _PinnedSlot:
        """Return the slot that was used longest ago, once neither the host nor the card uses it."""
        self._ring.rotate(-1)
        slot = self._ring[-1]
        slot.wait_idle()
        return slot

    def _wait_helpers(self) -> None:
        """Return once no helper touches a caller's array: when the call returns, the array may be freed."""
        wait([slot.host_copy for slot in self._ring if slot.host_copy is not None])

    def _parts(self, whole: Bytes) -> Iterator[tuple[int, Bytes]]:
        for offset in range(0, whole.size, self._slot_bytes):
            yield offset, whole[offset : offset + self._slot_bytes]


def bytes_of(array: Array) -> Bytes:
    """Return an array's elements in C order, as bytes: a view if the array is C-contiguous, else a copy."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)

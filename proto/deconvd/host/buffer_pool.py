"""A pool of host memory for large arrays: the memory of a dropped array is used again for the next one.

The first write to each page of new memory costs a page fault. All page faults together take longer than the copy
itself.
"""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec

__all__ = ["BufferPool"]

_MIN_POOLED_BYTES: Final = 1 << 20
"""Smaller arrays are not pooled: the C library's allocator keeps their pages."""

_MAX_IDLE_S: Final = 10.0
"""How long a buffer is kept that nobody takes. New memory for it costs less than a hundredth of that time."""


class _PooledBuffer:
    """Returns a buffer to the pool when no array in it is left: numpy keeps this object as the base of all of them.

    Args:
        size_bytes: How much of the buffer arrays see.
    """

    __slots__ = ("__array_interface__", "_buffer", "_pool")

    def __init__(self, pool: BufferPool, buffer: Array, size_bytes: int) -> None:
        interface: dict[str, Any] = buffer.__array_interface__
        interface["shape"] = (size_bytes,)
        self.__array_interface__ = interface
        self._pool = pool
        self._buffer = buffer

    def __del__(self) -> None:
        self._pool.release(self._buffer)


class BufferPool:
    """Allocates arrays; large ones get the memory of earlier arrays, if any is idle.

    An array belongs to the caller until nothing refers to it or to a view of it. Then its memory returns by itself.

    Thread-safe without a lock. A lock could deadlock: an array may be collected at any moment, also while the same
    thread is in a method here. And an interrupt may end a method anywhere; a buffer that is lost in this way is freed.

    Args:
        limit_bytes: How much idle memory the pool keeps.
        smallest_bytes: The smallest array that is pooled.
        spare_part: An array may get a buffer that is larger by this part of its size, if there is none of its size. It
            holds all of that memory. So arrays of many sizes share buffers.

    Attributes:
        hits_count, misses_count: How many arrays have had the memory of earlier ones, and how many new memory. Threads
            may have missed some of each other's.
    """

    def __init__(
        self,
        limit_bytes: int,
        smallest_bytes: int = _MIN_POOLED_BYTES,
        *,
        spare_part: float = 0.0,
    ) -> None:
        self._limit_bytes = limit_bytes
        self._smallest_bytes = smallest_bytes
        self._spare_part = spare_part
        self.hits_count: int = 0
        self.misses_count: int = 0
        # Since when each is idle, in the order of return. Each change and each copy of the dict is one atomic step of
        # the interpreter.
        self._idle: dict[int, tuple[float, Array]] = {}

    def empty(self, spec: TensorSpec) -> Array:
        """Return a C-contiguous array with arbitrary elements.

        Raises:
            MemoryError: The system has no memory for it.
        """
        size_bytes = spec.nbytes
        if not self._smallest_bytes <= size_bytes <= self._limit_bytes:
            return np.empty(spec.shape, spec.dtype)
        buffer = self._take(size_bytes)
        if buffer is None:
            self.misses_count += 1
            buffer = np.empty(size_bytes, np.uint8)
        else:
            self.hits_count += 1
        pooled = _PooledBuffer(self, buffer, size_bytes)
        return np.asarray(pooled).view(spec.dtype).reshape(spec.shape)

    @property
    def idle_bytes(self) -> int:
        """The size of the idle buffers."""
        return sum(buffer.nbytes for _, buffer in [*self._idle.values()])

    def release(self, buffer: Array) -> None:
        """Take a buffer back, and free those that have been idle for longest: until the limit holds, or for long."""
        now_s = time.monotonic()
        self._idle[id(buffer)] = now_s, buffer
        idle = [*self._idle.values()]
        excess_bytes = -self._limit_bytes
        for _, one in idle:
            excess_bytes += one.nbytes
        for since_s, oldest in idle:
            if excess_bytes <= 0 and now_s - since_s <= _MAX_IDLE_S:
                break
            self._idle.pop(id(oldest), None)
            excess_bytes -= oldest.nbytes

    def clear(self) -> None:
        """Free all idle buffers."""
        self._idle.clear()

    def _take(self, size_bytes: int) -> Array | None:
        """Return the smallest idle buffer that suits an array; None if there is none.

        Of those of one size it is the one that was released last, since caches may still have it.
        """
        while True:
            best: Array | None = None
            least_bytes = size_bytes * (1 + self._spare_part) + 1
            for _, buffer in reversed([*self._idle.values()]):
                if size_bytes <= buffer.nbytes < least_bytes:
                    best, least_bytes = buffer, buffer.nbytes
                    if least_bytes == size_bytes:
                        break
            # another thread may find the same buffer: the thread whose pop() returns it has it
            if best is None or self._idle.pop(id(best), None) is not None:
                return best

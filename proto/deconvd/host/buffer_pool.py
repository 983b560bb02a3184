"""A pool of host memory for large arrays: the memory of a dropped array is used again for the next one.

The first write to each page of new memory costs a page fault. All page faults together take longer than the copy
itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec

__all__ = ["BufferPool"]

_MIN_POOLED_BYTES = 1 << 20
"""Smaller arrays are not pooled: the C library's allocator keeps their pages."""


class _PooledBuffer:
    """Returns a buffer to the pool when no array in it is left: numpy keeps this object as the base of all of them."""

    __slots__ = ("__array_interface__", "_buffer", "_pool")

    def __init__(self, pool: BufferPool, buffer: Array) -> None:
        self.__array_interface__: dict[str, Any] = buffer.__array_interface__
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
    """

    def __init__(self, limit_bytes: int, smallest_bytes: int = _MIN_POOLED_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._smallest_bytes = smallest_bytes
        # In the order of return. Each change and each copy of the dict is one atomic step of the interpreter.
        self._idle: dict[int, Array] = {}

    def empty(self, spec: TensorSpec) -> Array:
        """Return a C-contiguous array with arbitrary elements.

        Raises:
            MemoryError: The system has no memory for it.
        """
        if not self._smallest_bytes <= spec.nbytes <= self._limit_bytes:
            return np.empty(spec.shape, spec.dtype)
        buffer = self._take(spec.nbytes)
        if buffer is None:
            buffer = np.empty(spec.nbytes, np.uint8)
        return np.asarray(_PooledBuffer(self, buffer)).view(spec.dtype).reshape(spec.shape)

    @property
    def idle_bytes(self) -> int:
        """The size of the idle buffers."""
        return sum(buffer.nbytes for buffer in [*self._idle.values()])

    def release(self, buffer: Array) -> None:
        """Take a buffer back, and free the buffers that have been idle for longest until the limit holds."""
        self._idle[id(buffer)] = buffer
        idle = [*self._idle.values()]
        excess_bytes = -self._limit_bytes
        for one in idle:
            excess_bytes += one.nbytes
        for oldest in idle:
            if excess_bytes <= 0:
                break
            self._idle.pop(id(oldest), None)
            excess_bytes -= oldest.nbytes

    def clear(self) -> None:
        """Free all idle buffers."""
        self._idle.clear()

    def _take(self, size_bytes: int) -> Array | None:
        """Return the idle buffer of exactly this size that was released last, since caches may still have it."""
        for buffer in reversed([*self._idle.values()]):
            # another thread may find the same buffer: the thread whose pop() returns it has it
            if buffer.nbytes == size_bytes and self._idle.pop(id(buffer), None) is not None:
                return buffer
        return None

"""Host memory for large arrays, used again once whoever has one has dropped it.

Fresh memory costs a page fault for every few KiB that are first written: more than the copy itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec

__all__ = ["BufferPool"]

_MIN_POOLED_BYTES = 1 << 20
"""Arrays below this are not worth it: the allocator keeps their pages itself."""


class _PooledBuffer:
    """Owns a buffer for as long as any array lies in it: numpy keeps it as their base."""

    __slots__ = ("__array_interface__", "_buffer", "_memory")

    def __init__(self, memory: BufferPool, buffer: Array) -> None:
        self.__array_interface__: dict[str, Any] = buffer.__array_interface__
        self._memory = memory
        self._buffer = buffer

    def __del__(self) -> None:
        self._memory.release(self._buffer)


class BufferPool:
    """Gives new arrays, the large ones in memory that was used before where there is some.

    An array is the caller's alone until nothing refers to it, nor to a view of it. Thread-safe,
    without a lock: arrays are dropped at any moment, also while this thread is in a method here,
    and an interrupt may end a method anywhere. A buffer that is lost that way is freed.

    Args:
        limit_bytes: What is kept for later arrays.
        smallest_bytes: What arrays must have to be kept.
    """

    def __init__(self, limit_bytes: int, smallest_bytes: int = _MIN_POOLED_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._smallest_bytes = smallest_bytes
        # in the order of return; each is changed and copied in one step of the interpreter
        self._idle: dict[int, Array] = {}

    def empty(self, spec: TensorSpec) -> Array:
        """Return a C-contiguous array with whatever was there before.

        Raises:
            MemoryError: There is no memory for it.
        """
        if not self._smallest_bytes <= spec.nbytes <= self._limit_bytes:
            return np.empty(spec.shape, spec.dtype)
        buffer = self._take(spec.nbytes)
        if buffer is None:
            buffer = np.empty(spec.nbytes, np.uint8)
        return np.asarray(_PooledBuffer(self, buffer)).view(spec.dtype).reshape(spec.shape)

    @property
    def idle_bytes(self) -> int:
        """What is kept for later arrays now."""
        return sum(buffer.nbytes for buffer in [*self._idle.values()])

    def release(self, buffer: Array) -> None:
        """Keep a buffer for later arrays, and drop what came back longest ago beyond the limit."""
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
        """Keep nothing that has come back so far."""
        self._idle.clear()

    def _take(self, size_bytes: int) -> Array | None:
        """Return a kept buffer of just this size, the one that came back last."""
        for buffer in reversed([*self._idle.values()]):
            # another thread may take the same one: whichever pops it has it
            if buffer.nbytes == size_bytes and self._idle.pop(id(buffer), None) is not None:
                return buffer
        return None

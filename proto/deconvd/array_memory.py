"""Host memory for large arrays, used again once whoever has one has dropped it.

Fresh memory costs a page fault for every few KiB that are first written: more than the copy itself.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from typing import Any

import numpy as np

from deconvd.problem import TensorSpec
from deconvd.tensor import Array

__all__ = ["ArrayMemory"]

_SMALLEST_BYTES = 1 << 20
"""Arrays below this are not worth it: the allocator keeps their pages itself."""


class _Loan:
    """Owns a buffer for as long as any array lies in it: numpy keeps it as their base."""

    def __init__(self, buffer: Array) -> None:
        self.__array_interface__: dict[str, Any] = buffer.__array_interface__


class ArrayMemory:
    """Gives new arrays, the large ones in memory that was used before where there is some.

    An array is the caller's alone until nothing refers to it, nor to a view of it. Thread-safe.

    Args:
        limit_bytes: What is kept for later arrays.
        smallest_bytes: What arrays must have to be kept.
    """

    def __init__(self, limit_bytes: int, smallest_bytes: int = _SMALLEST_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._smallest_bytes = smallest_bytes
        self._lock = threading.Lock()
        # filled by finalizers, which may run at any moment in any thread: they must wait for no lock
        self._returned: deque[Array] = deque()
        self._idle: OrderedDict[int, Array] = OrderedDict()
        self._idle_bytes = 0

    def empty(self, spec: TensorSpec) -> Array:
        """Return a C-contiguous array with whatever was there before.

        Raises:
            MemoryError: There is no memory for it.
        """
        if not self._smallest_bytes <= spec.nbytes <= self._limit_bytes:
            return np.empty(spec.shape, spec.dtype)
        buffer = self._taken(spec.nbytes)
        if buffer is None:
            buffer = np.empty(spec.nbytes, np.uint8)
        loan = _Loan(buffer)
        weakref.finalize(loan, self._give_back, buffer).atexit = False
        return np.asarray(loan).view(spec.dtype).reshape(spec.shape)

    @property
    def idle_bytes(self) -> int:
        """What is kept for later arrays now."""
        with self._lock:
            self._collect()
            return self._idle_bytes

    def clear(self) -> None:
        """Keep nothing that has come back so far."""
        with self._lock:
            self._collect()
            self._idle.clear()
            self._idle_bytes = 0

    def _taken(self, size_bytes: int) -> Array | None:
        """Return a kept buffer of just this size, the one that came back last."""
        with self._lock:
            self._collect()
            for key in reversed(self._idle):
                if self._idle[key].nbytes == size_bytes:
                    self._idle_bytes -= size_bytes
                    return self._idle.pop(key)
        return None

    def _give_back(self, buffer: Array) -> None:
        self._returned.append(buffer)
        if self._lock.acquire(blocking=False):
            try:
                self._collect()
            finally:
                self._lock.release()

    def _collect(self) -> None:
        """Keep what has come back, and drop what came back longest ago beyond the limit."""
        while self._returned:
            buffer = self._returned.popleft()
            self._idle[id(buffer)] = buffer
            self._idle_bytes += buffer.nbytes
        while self._idle_bytes > self._limit_bytes:
            _, oldest = self._idle.popitem(last=False)
            self._idle_bytes -= oldest.nbytes

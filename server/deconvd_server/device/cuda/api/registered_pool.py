"""A pool of registered host memory: the memory of a dropped array is used again for the next one. Needs no CUDA.

Page faults and registration take several times as long as a call's copies from and to the card.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, TypeAlias

import numpy as np

from deconvd.errors import ExhaustedError
from deconvd.host.array_address import address_of
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd.wire.cache_state import CacheState

__all__ = ["SMALLEST_REGISTERED_BYTES", "Register", "RegisteredPool", "size_class"]

SMALLEST_REGISTERED_BYTES: Final = 256 << 10
"""Smaller arrays are plain memory: lanes copy them to pinned memory sooner than the card fetches them by itself."""

_CLASSES_PER_DOUBLING: Final = 8
"""Sizes of buffers between one power of two and the next. A buffer is at most an eighth larger than its array."""

_log = logging.getLogger(__name__)

Register: TypeAlias = Callable[[int, int], Callable[[], None]]
"""Registers memory, given its address and its size in bytes. Returns what undoes it: see `RegisteredMemory`."""


def size_class(size_bytes: int) -> int:
    """Return the size of the buffer for an array: the next multiple of an eighth of a power of two, in whole pages.

    Arrays of sizes that were never seen before thus find buffers of arrays of about their size.
    """
    step = max((1 << size_bytes.bit_length() - 1) // _CLASSES_PER_DOUBLING, mmap.PAGESIZE)
    return -(-size_bytes // step) * step


class _RegisteredBuffer:
    """A buffer of whole pages.

    Attributes:
        bytes: Its memory.
        is_kept: Whether the pool keeps it for the next array.
        unregister: Undoes the registration.
        return_number: Counts up over the returns of all buffers.
    """

    __slots__ = ("bytes", "is_kept", "return_number", "unregister")

    def __init__(self, size_bytes: int, register: Register, *, is_kept: bool) -> None:
        # numpy asks for huge pages, and the C library counts the memory: see `allocated_bytes`.
        memory = np.empty(size_bytes + mmap.PAGESIZE, np.uint8)
        begin = -address_of(memory) % mmap.PAGESIZE
        self.bytes = memory[begin : begin + size_bytes]
        self.is_kept = is_kept
        self.return_number = 0
        self.unregister = register(address_of(self.bytes), size_bytes)


class _BufferLoan:
    """Returns a buffer to the pool when no array in it is left: numpy keeps this object as the base of all of them."""

    __slots__ = ("__array_interface__", "_buffer", "_pool")

    def __init__(self, pool: RegisteredPool, buffer: _RegisteredBuffer) -> None:
        self.__array_interface__: dict[str, Any] = buffer.bytes.__array_interface__
        self._pool = pool
        self._buffer = buffer

    def __del__(self) -> None:
        self._pool.release(self._buffer)


class RegisteredPool:
    """Allocates arrays in registered memory; most of them get the memory of earlier arrays. Thread-safe.

        empty --> an array's --the array is collected--> idle --> another array's
                                                         idle for longest, beyond the limit --> retired

    An array belongs to the caller until nothing refers to it or to a view of it. Then its memory returns by itself. An
    array may be collected at any moment and in any thread, even one that is in a method here or holds any lock. So a
    return takes no lock and calls nothing of CUDA: it is a few atomic steps of the interpreter. A thread of the pool
    unregisters and frees the buffers that are retired.

    The pool bounds idle memory only. What arrays take, rounded up to `size_class`, is for the caller to admit.

    If CUDA refuses to register a buffer, the pool serves arrays in plain memory, which are staged like all others.

    Args:
        limit_bytes: How much idle memory it keeps. Arrays of more bytes are plain memory.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()  # guards the thread and the counts
        self._users_count = 0
        self._hits_count = 0
        self._misses_count = 0
        self._retire_thread: threading.Thread | None = None
        self._retired: SimpleQueue[_RegisteredBuffer | None] = SimpleQueue()  # None ends the thread
        # Changed by atomic steps alone. Who removes a buffer from one of these has it.
        self._registered: dict[int, _RegisteredBuffer] = {}
        self._idle: dict[int, deque[_RegisteredBuffer]] = {}  # by size, each in order of return
        self._return_numbers = itertools.count(1)

    def open(self) -> None:
        """Add a user, such as a card. The pool may be used until each has called `close`."""
        with self._lock:
            self._users_count += 1
            if self._retire_thread is None:
                self._retire_thread = threading.Thread(
                    target=self._unregister_retired, name="registered-memory", daemon=True
                )
                self._retire_thread.start()

    def close(self) -> None:
        """Remove a user. After the last one, unregister all memory.

        Arrays that are left stay valid, as plain memory.
        """
        with self._lock:
            self._users_count -= 1
            if self._users_count or self._retire_thread is None:
                return
            self._retired.put(None)
            self._retire_thread.join()
            self._retire_thread = None
            self._idle.clear()
            for buffer in [*self._registered.values()]:
                self._unregister(buffer)

    def empty(self, spec: TensorSpec, register: Register, *, is_lasting: bool = False) -> Array:
        """Return a C-contiguous array in native byte order with arbitrary elements.

        Args:
            register: Registers a new buffer.
            is_lasting: The array takes exactly its size, in whole pages, and its memory is not kept afterwards. For
                arrays that stay for long, whose bytes are counted one by one.

        Raises:
            ExhaustedError: The system has no memory for it.
        """
        dtype = spec.dtype.newbyteorder("=")
        size_bytes = size_class(spec.nbytes) if spec.nbytes else 0
        if is_lasting:
            size_bytes = -(-spec.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        is_plain = spec.nbytes < SMALLEST_REGISTERED_BYTES
        is_plain |= size_bytes > self._limit_bytes and not is_lasting
        try:
            if is_plain:
                return np.empty(spec.shape, dtype)
            buffer = None if is_lasting else self._take_idle(size_bytes)
            if not is_lasting:
                self._count(is_hit=buffer is not None)
            if buffer is None:
                buffer = _RegisteredBuffer(size_bytes, register, is_kept=not is_lasting)
                self._registered[id(buffer)] = buffer
        except MemoryError:
            raise ExhaustedError(
                f"the host has no memory left for an array of {spec.nbytes} bytes"
            ) from None
        whole = np.asarray(_BufferLoan(self, buffer))
        return whole[: spec.nbytes].view(dtype).reshape(spec.shape)

    @property
    def idle_bytes(self) -> int:
        """The size of the idle buffers."""
        return sum([size * len(buffers) for size, buffers in [*self._idle.items()]])

    @property
    def cache_state(self) -> CacheState:
        """The state of the idle buffers, without a trace of lasting arrays: they may be other tenants' residents."""
        with self._lock:
            hits_count, misses_count = self._hits_count, self._misses_count
        return CacheState(
            name="host buffers",
            count=sum([len(buffers) for buffers in [*self._idle.values()]]),
            size_bytes=self.idle_bytes,
            limit_bytes=self._limit_bytes,
            hits_count=hits_count,
            misses_count=misses_count,
        )

    @property
    def registered_bytes(self) -> int:
        """The size of all buffers: those that are idle, and those of arrays."""
        return sum([buffer.bytes.nbytes for buffer in [*self._registered.values()]])

    def release(self, buffer: _RegisteredBuffer) -> None:
        """Take a buffer back, and retire the buffers that have been idle for longest until the limit holds."""
        if id(buffer) not in self._registered:
            return  # the pool was closed meanwhile
        if not buffer.is_kept:
            self._retired.put(buffer)  # a queue whose `put` is safe in any thread at any moment
            return
        buffer.return_number = next(self._return_numbers)
        self._idle.setdefault(buffer.bytes.nbytes, deque()).append(buffer)
        while self.idle_bytes > self._limit_bytes:
            oldest = self._take_oldest()
            if oldest is None:
                return  # other threads were faster
            self._retired.put(oldest)

    def _count(self, *, is_hit: bool) -> None:
        with self._lock:
            self._hits_count += is_hit
            self._misses_count += not is_hit

    def _take_idle(self, size_bytes: int) -> _RegisteredBuffer | None:
        """Return the idle buffer of a size that was returned last, since caches may still have it."""
        try:
            return self._idle[size_bytes].pop()
        except (KeyError, IndexError):
            return None

    def _take_oldest(self) -> _RegisteredBuffer | None:
        """Return the buffer that has been idle for longest, or about so if other threads take some meanwhile."""
        oldest: tuple[int, deque[_RegisteredBuffer]] | None = None
        for buffers in [*self._idle.values()]:
            try:
                first = buffers[0].return_number
            except IndexError:
                continue
            if oldest is None or first < oldest[0]:
                oldest = first, buffers
        try:
            return None if oldest is None else oldest[1].popleft()
        except IndexError:
            return None

    def _unregister_retired(self) -> None:
        while self._unregister_next():
            pass

    def _unregister_next(self) -> bool:
        """Wait for a retired buffer and unregister it; return False once the thread must end."""
        buffer = self._retired.get()
        if buffer is not None:
            self._unregister(buffer)
        return buffer is not None

    def _unregister(self, buffer: _RegisteredBuffer) -> None:
        if self._registered.pop(id(buffer), None) is None:
            return
        try:
            buffer.unregister()
        except RuntimeError as error:  # such as CudaError, once the card is lost
            _log.warning("CUDA does not unregister host memory: %s", error)

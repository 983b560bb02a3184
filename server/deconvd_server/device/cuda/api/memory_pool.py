"""The card's memory as CuPy's pools hand it out: one pool for calls, one for residents, none for shared memory."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from deconvd_server.device.cuda.api.cupy_library import CudaError, cuda_runtime, cupy
from deconvd_server.device.cuda.api.runtime import Stream, current_device

__all__ = ["CardMemoryPool"]


class CardMemoryPool:
    """The card's memory, up to a limit. Freed blocks are kept for the next caller. Thread-safe.

        allocate            blocks of calls             kept when freed
        allocate_resident   blocks of residents         kept when freed, in a pool of their own
        allocate_shared     blocks for other processes  given back to the card at once

    Residents have a pool of their own because a small resident would split a large block that calls use
    again and again, and so keep it from them. A shared block comes from no pool because the other process
    would see the rest of the pool's allocation too.

    A freed block may be used on any stream at once, so the card must be done with it before it is freed.
    (CuPy has one pool for each current stream of a thread. All threads here leave that at CUDA's null
    stream, so they use one pool.)

    Args:
        limit_bytes: Bound on the blocks in use and the blocks kept, together.

    Attributes:
        misses_count: Blocks for calls that no kept block could serve. For statistics: threads may lose a
            count.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._lock = (
            threading.RLock()
        )  # re-entrant: a finalizer may take it in a thread that has it
        self._pool = cupy.cuda.MemoryPool()
        self._resident_pool = cupy.cuda.MemoryPool()
        self._pool.set_limit(size=limit_bytes)
        self._shared_bytes = 0
        self.misses_count = 0

    def allocate(self, size_bytes: int) -> Any:
        """Return a block for a call. It is given back when it is collected; its `ptr` is aligned to 512 bytes.

        Raises:
            MemoryError: The limit, or the card, leaves no room for it.
        """
        held_bytes = self._pool.total_bytes()
        try:
            block = self._pool.malloc(size_bytes)
        except MemoryError:
            # the pool has given back its own kept blocks by now: those of freed residents are left
            with self._lock:
                self._resident_pool.free_all_blocks()
                self._share_limit()
            block = self._pool.malloc(size_bytes)
        self.misses_count += self._pool.total_bytes() > held_bytes
        return block

    def allocate_resident(self, size_bytes: int) -> Any:
        """Return a block for a resident. Otherwise as `allocate`."""
        with self._lock:
            self._make_room(size_bytes)
            try:
                return self._resident_pool.malloc(size_bytes)
            finally:
                self._share_limit()

    def allocate_shared(self, size_bytes: int) -> Any:
        """Return a block, all zeros, that another process may open. Otherwise as `allocate`."""
        with self._lock:
            self._make_room(size_bytes)
            try:
                block = _Allocation(size_bytes, partial(self._count_shared, -size_bytes))
            except CudaError as error:
                raise MemoryError(f"no {size_bytes} bytes to share: {error}") from None
            self._count_shared(size_bytes)
        stream = Stream()  # waiting for the whole card would break what other threads capture
        cuda_runtime.memsetAsync(block.ptr, 0, size_bytes, stream.pointer)
        stream.wait()
        return block

    def held_for_calls_bytes(self) -> int:
        """Return the card's memory that blocks of calls take, in use and kept."""
        return int(self._pool.total_bytes())

    def held_bytes(self) -> int:
        """Return the card's memory that all blocks take, in use and kept."""
        pools_bytes = self._pool.total_bytes() + self._resident_pool.total_bytes()
        return int(pools_bytes + self._shared_bytes)

    def trim(self) -> None:
        """Give the kept blocks back to the card."""
        self._pool.free_all_blocks()
        self._resident_pool.free_all_blocks()

    def _make_room(self, size_bytes: int) -> None:
        """Give the kept blocks back to the card if the limit has no room for that many bytes next to them."""
        if self.held_bytes() + size_bytes > self.limit_bytes:
            self.trim()

    def _count_shared(self, size_bytes: int) -> None:
        with self._lock:
            self._shared_bytes += size_bytes
            self._share_limit()

    def _share_limit(self) -> None:
        """Limit the pool of calls to the memory that residents and shared blocks leave."""
        rest_bytes = self.limit_bytes - self._resident_pool.total_bytes() - self._shared_bytes
        self._pool.set_limit(size=max(rest_bytes, 1))  # to CuPy, 0 is no limit


class _Allocation:
    """Memory of the current card that no pool has; given back when it is collected."""

    def __init__(self, size_bytes: int, on_free: Callable[[], None]) -> None:
        self.ptr: int = cuda_runtime.malloc(size_bytes)
        ordinal = cupy.cuda.Device().id
        free = weakref.finalize(self, _free_allocation, ordinal, self.ptr, on_free)
        free.atexit = False  # CUDA may have ended before, and frees all of it anyway


def _free_allocation(ordinal: int, address: int, on_free: Callable[[], None]) -> None:
    with current_device(ordinal):
        cuda_runtime.free(address)
    on_free()

"""The card's memory as calls and residents use it: one block each, within a limit, and counted. Needs no CUDA."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Final, Protocol

from deconvd.errors import ExhaustedError

__all__ = ["BlockLayout", "BlockRegion", "DeviceMemory", "Lease", "MemoryStats"]

ALIGNMENT_BYTES = 256
"""The address of every operand, result and workspace in a block is a multiple of this."""


_POLL_INTERVAL_S: Final = 0.02
"""How often a call that waits for a search's memory looks whether it is still wanted."""


def _do_nothing() -> None:
    pass


class _User(Enum):
    """Who has a block."""

    CALL = auto()
    SEARCH = auto()
    RESIDENT = auto()


class _MemoryBlock(Protocol):
    @property
    def ptr(self) -> int: ...


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """The use of the card's memory by calls and residents.

    Attributes:
        blocks_count: Blocks that calls and searches use. Those of residents are left out, since this number is reported
            to clients.
        used_bytes: Size of all blocks in use.
        peak_bytes: The largest `used_bytes` so far.
        limit_bytes: Bound on `used_bytes`.
        leased_count: Blocks that were leased to them so far.
        refused_count: Leases that the limit did not allow.
    """

    blocks_count: int
    used_bytes: int
    peak_bytes: int
    limit_bytes: int
    leased_count: int
    refused_count: int


class Lease:
    """A block of memory until it is freed, or for the length of a with-block, which gets its address.

    The card must be done with the block before it is freed.
    """

    __slots__ = ("_block", "_on_free")

    def __init__(self, block: _MemoryBlock, on_free: Callable[[], None]) -> None:
        self._block: _MemoryBlock | None = block
        self._on_free = on_free

    @property
    def pointer(self) -> int:
        """The block's address."""
        if self._block is None:
            raise ValueError("the memory is freed")
        return self._block.ptr

    def free(self) -> None:
        """Give the block back, once."""
        if self._block is None:
            raise ValueError("the memory is freed already")
        self._block = None
        self._on_free()

    def __enter__(self) -> int:
        return self.pointer

    def __exit__(self, *_: object) -> None:
        self.free()


class DeviceMemory:
    """Leases blocks of the card's memory to calls and residents. Thread-safe.

    Args:
        limit_bytes: Bound on the size of all blocks together.
        allocate: Returns a block of that many bytes, which is given back once it is collected. Raises MemoryError if
            the card has no such block.
        allocate_resident: The same, for blocks that stay for long.
        allocate_shared: The same, for blocks that another process opens: all zeros, and with no other block in the same
            allocation.
    """

    def __init__(
        self,
        limit_bytes: int,
        allocate: Callable[[int], _MemoryBlock],
        *,
        allocate_resident: Callable[[int], _MemoryBlock],
        allocate_shared: Callable[[int], _MemoryBlock],
    ) -> None:
        self._limit_bytes = limit_bytes
        self._allocate = allocate
        self._allocate_resident = allocate_resident
        self._allocate_shared = allocate_shared
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._used_bytes = 0
        self._searched_bytes = 0
        self._waiting_count = 0  # calls and residents that wait for the end of a search
        self._peak_bytes = 0
        self._blocks_count = 0
        self._leased_count = 0
        self._refused_count = 0

    def lease(self, size_bytes: int, check: Callable[[], None] = _do_nothing) -> Lease:
        """Lease a block to a call. If the limit allows it only without a search's block, wait for the end of that.

        Args:
            check: Raises once the call is wanted no more. Asked while it waits.

        Raises:
            ExhaustedError: The limit does not allow it now, or the card has no memory for it.
        """
        return self._lease_block(size_bytes, self._allocate, _User.CALL, check)

    def lease_for_search(self, size_bytes: int) -> Lease:
        """Lease a block to a search for a plan, which has it for milliseconds.

        No call may fail because of a search that none waits for, so calls and residents wait for its end.

        Raises as `lease` does. It waits only for those that wait for another search, so that they get its memory.
        """
        return self._lease_block(size_bytes, self._allocate, _User.SEARCH)

    def lease_resident(self, size_bytes: int) -> Lease:
        """Lease a block to a resident. Raises as `lease` does."""
        return self._lease_block(size_bytes, self._allocate_resident, _User.RESIDENT)

    def lease_shared(self, size_bytes: int) -> Lease:
        """Lease a block that another process may open. Raises as `lease` does."""
        return self._lease_block(size_bytes, self._allocate_shared, _User.RESIDENT)

    @property
    def stats(self) -> MemoryStats:
        """The use of the memory now."""
        with self._lock:
            return MemoryStats(
                self._blocks_count,
                self._used_bytes,
                self._peak_bytes,
                self._limit_bytes,
                self._leased_count,
                self._refused_count,
            )

    def _lease_block(
        self,
        size_bytes: int,
        allocate: Callable[[int], _MemoryBlock],
        user: _User,
        check: Callable[[], None] = _do_nothing,
    ) -> Lease:
        self._reserve(size_bytes, user, check)
        try:
            return Lease(allocate(size_bytes), partial(self._unreserve, size_bytes, user))
        except MemoryError as error:
            self._unreserve(size_bytes, user)
            raise ExhaustedError(
                f"{size_bytes} bytes of the card's memory are needed, and it has no such block: {error}"
            ) from None
        except BaseException:
            self._unreserve(size_bytes, user)
            raise

    def _reserve(self, size_bytes: int, user: _User, check: Callable[[], None]) -> None:
        with self._lock:
            if user is _User.SEARCH:
                self._wait_for_others(size_bytes)
            elif size_bytes > self._free_bytes:
                self._wait_for_searches(size_bytes, check)
            if size_bytes > self._free_bytes:
                self._refused_count += 1
                raise ExhaustedError(
                    f"{size_bytes} bytes of the card's memory are needed, {self._free_bytes} of "
                    f"{self._limit_bytes} are free"
                )
            self._count(size_bytes, user, 1)
            self._leased_count += user is not _User.RESIDENT
            self._peak_bytes = max(self._peak_bytes, self._used_bytes)

    def _wait_for_others(self, size_bytes: int) -> None:
        """Let those go first, in a search for which there is room, that wait for the end of another search."""
        while self._waiting_count and size_bytes <= self._free_bytes:
            self._changed.wait()

    def _wait_for_searches(self, size_bytes: int, check: Callable[[], None]) -> None:
        """Wait for the ends of searches, as far as they make room."""
        self._waiting_count += 1
        try:
            while self._free_bytes < size_bytes <= self._free_bytes + self._searched_bytes:
                self._changed.wait(_POLL_INTERVAL_S)
                check()
        finally:
            self._waiting_count -= 1
            if not self._waiting_count:
                self._changed.notify_all()

    def _unreserve(self, size_bytes: int, user: _User) -> None:
        with self._lock:
            self._count(-size_bytes, user, -1)
            if self._waiting_count:
                self._changed.notify_all()

    @property
    def _free_bytes(self) -> int:
        return self._limit_bytes - self._used_bytes

    def _count(self, size_bytes: int, user: _User, count: int) -> None:
        self._used_bytes += size_bytes
        if user is not _User.RESIDENT:
            self._blocks_count += count
        if user is _User.SEARCH:
            self._searched_bytes += size_bytes


@dataclass(frozen=True, slots=True)
class BlockRegion:
    """A part of a block.

    Attributes:
        offset: In bytes from the block's start.
        size_bytes: Without what alignment adds.
    """

    offset: int
    size_bytes: int


class BlockLayout:
    """Regions of a block, one after the other, each aligned to ALIGNMENT_BYTES."""

    def __init__(self) -> None:
        self.total_bytes = 0

    def add(self, size_bytes: int) -> BlockRegion:
        """Return a new region at the end."""
        region = BlockRegion(self.total_bytes, size_bytes)
        self.total_bytes += -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return region

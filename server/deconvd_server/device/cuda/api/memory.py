"""The card's memory as calls and tensors use it: one block each, bounded, accounted for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from deconvd.errors import ExhaustedError

__all__ = ["BlockLayout", "BlockRegion", "DeviceMemory", "Lease", "MemoryStats"]

ALIGNMENT_BYTES = 256
"""What the address of every operand, result and workspace is a multiple of."""


class _MemoryBlock(Protocol):
    @property
    def ptr(self) -> int: ...


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """What calls and tensors take of the card's memory.

    Attributes:
        blocks_count: Blocks that calls use: what clients keep is not to be told to others.
        used_bytes: What all blocks in use take together.
        peak_bytes: What they took at most so far.
        limit_bytes: What they may take.
        taken_count: Blocks that were lent to calls so far.
        refused_count: Blocks that could not be lent.
    """

    blocks_count: int
    used_bytes: int
    peak_bytes: int
    limit_bytes: int
    leased_count: int
    refused_count: int


class Lease:
    """A block that is lent until it is freed, or for the length of a with-block, which gets its address.

    The card must be done with it then.
    """

    __slots__ = ("_block", "_on_free")

    def __init__(self, block: _MemoryBlock, on_free: Callable[[], None]) -> None:
        self._block: _MemoryBlock | None = block
        self._on_free = on_free

    @property
    def pointer(self) -> int:
        """Its address."""
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
    """Blocks of the card's memory, lent to calls and to tensors. Thread-safe.

    Args:
        limit_bytes: What all blocks may take together.
        allocate: Returns a block of so many bytes, given back once it is collected; raises
            MemoryError if there is none.
        allocate_to_stay: The same, for blocks that stay for long.
        allocate_to_lend: The same, for blocks that other processes see: all zeros, and with nothing
            of others beside them.
    """

    def __init__(
        self,
        limit_bytes: int,
        allocate: Callable[[int], _MemoryBlock],
        *,
        allocate_to_stay: Callable[[int], _MemoryBlock],
        allocate_to_lend: Callable[[int], _MemoryBlock],
    ) -> None:
        self._limit_bytes = limit_bytes
        self._allocate = allocate
        self._allocate_to_stay = allocate_to_stay
        self._allocate_to_lend = allocate_to_lend
        self._lock = threading.Lock()
        self._used_bytes = 0
        self._peak_bytes = 0
        self._blocks_count = 0
        self._leased_count = 0
        self._refused_count = 0

    def lease(self, size_bytes: int) -> Lease:
        """Lend a block.

        Raises:
            ExhaustedError: The limit does not allow it now, or the card has not the memory.
        """
        return self._lease_block(size_bytes, self._allocate, is_of_call=True)

    def lease_resident(self, size_bytes: int) -> Lease:
        """Lend a block for long. Raises as `take` does."""
        return self._lease_block(size_bytes, self._allocate_to_stay)

    def lease_shared(self, size_bytes: int) -> Lease:
        """Lend a block that other processes see. Raises as `take` does."""
        return self._lease_block(size_bytes, self._allocate_to_lend)

    @property
    def stats(self) -> MemoryStats:
        """What is taken now."""
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
        self, size_bytes: int, allocate: Callable[[int], _MemoryBlock], *, is_of_call: bool = False
    ) -> Lease:
        self._reserve(size_bytes, is_of_call)
        try:
            return Lease(allocate(size_bytes), partial(self._unreserve, size_bytes, is_of_call))
        except MemoryError as error:
            self._unreserve(size_bytes, is_of_call)
            raise ExhaustedError(
                f"the card has not the {size_bytes} bytes of memory that are needed: {error}"
            ) from None
        except BaseException:
            self._unreserve(size_bytes, is_of_call)
            raise

    def _reserve(self, size_bytes: int, is_of_call: bool) -> None:
        with self._lock:
            free_bytes = self._limit_bytes - self._used_bytes
            if size_bytes > free_bytes:
                self._refused_count += 1
                raise ExhaustedError(
                    f"{size_bytes} bytes of the card's memory are needed, {free_bytes} of "
                    f"{self._limit_bytes} are free"
                )
            self._used_bytes += size_bytes
            self._blocks_count += is_of_call
            self._leased_count += is_of_call
            self._peak_bytes = max(self._peak_bytes, self._used_bytes)

    def _unreserve(self, size_bytes: int, is_of_call: bool) -> None:
        with self._lock:
            self._used_bytes -= size_bytes
            self._blocks_count -= is_of_call


@dataclass(frozen=True, slots=True)
class BlockRegion:
    """A part of a block.

    Attributes:
        offset: Where it begins, in bytes from the block's start.
        size_bytes: Its length.
    """

    offset: int
    size_bytes: int


class BlockLayout:
    """Regions of a block, one behind the other, each aligned."""

    def __init__(self) -> None:
        self.total_bytes = 0

    def add(self, size_bytes: int) -> BlockRegion:
        """Return a new region at the end."""
        region = BlockRegion(self.total_bytes, size_bytes)
        self.total_bytes += -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return region

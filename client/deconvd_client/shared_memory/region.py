"""Stretches of memory that the server lent, and the arrays in them. No server here."""

from __future__ import annotations

import mmap
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import Any

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd.wire.shared_slice import SharedSlice
from deconvd_client.shared_memory.arena import Arena

__all__ = ["BorrowedBlock", "BorrowedRegion", "HostRegion", "RegionPool", "RegionState"]


class RegionState(Enum):
    """What a region is good for.

    OPEN --a call ended nobody knows how--> CLOSED --its last block freed--> given back
    """

    OPEN = "open"
    CLOSED = "closed"
    """A call may still write into a part of it, so it has no room for more. What it holds stays."""


class BorrowedBlock:
    """One array's memory. It is free again once this, which the array refers to, has gone.

    Views refer to it too, so that is when the last of them has gone.
    """

    __slots__ = ("__weakref__", "offset", "reference", "region")
    reference: _BlockReference

    def __init__(self, region: BorrowedRegion, offset: int) -> None:
        self.region: BorrowedRegion = region  # whose memory is mapped for as long as this is
        self.offset: int = offset

    def array(self, spec: TensorSpec) -> Array:
        """Return the memory as an array."""
        return self.region.array(self, spec)

    def mark_in_doubt(self, *, is_in_doubt: bool = True) -> None:
        """Say whether the server may write to it, so that its memory must not be another's once it goes.

        That is said before a call begins, and taken back after: nothing has to happen where one is broken off.
        """
        self.reference.is_in_doubt = is_in_doubt

    @property
    def shared_slice(self) -> SharedSlice:
        """Where it is, for the server."""
        return SharedSlice(self.region.name, self.offset)


class _BlockReference(weakref.ref[BorrowedBlock]):
    """Sees whether a block is still in use.

    Its callback is a list's own method: when a block goes, whatever thread that is may hold the
    borrower's lock, and an interrupt that struck code of ours there would be lost, and the block too.
    """

    __slots__ = ("is_in_doubt", "offset", "size_bytes")
    is_in_doubt: bool
    offset: int
    size_bytes: int


class BorrowedRegion(ABC):
    """One piece of memory that the server lent. Its borrower calls it under one lock.

    Args:
        name: The secret by which the server knows it.
        address: Where it begins, as arrays have it.
    """

    def __init__(self, name: bytes, address: int, size_bytes: int) -> None:
        self.name = name
        self.address = address
        self.size_bytes = size_bytes
        self.state: RegionState = RegionState.OPEN
        self._arena = Arena(size_bytes)
        self._references: dict[int, _BlockReference] = {}
        self._dead_references: deque[_BlockReference] = (
            deque()
        )  # of blocks that have gone, as they went

    @abstractmethod
    def array(self, block: BorrowedBlock, spec: TensorSpec) -> Array:
        """Return a block as an array, which refers to it."""

    @abstractmethod
    def unmap(self) -> None:
        """Have nothing more to do with the memory, which is about to be given back."""

    @property
    def is_empty(self) -> bool:
        """Whether no block is in use."""
        return self._arena.is_empty

    @property
    def allocated_bytes(self) -> int:
        """What blocks take."""
        return self._arena.allocated_bytes

    def allocate(self, size_bytes: int) -> BorrowedBlock | None:
        """Return a new block; None if there is no room for it."""
        if self.state is not RegionState.OPEN:
            return None
        offset = self._arena.allocate(size_bytes)
        return None if offset is None else self._make_block(offset, size_bytes)

    def reuse_last(self, size_bytes: int) -> BorrowedBlock | None:
        """Return the block that went last anew, if it was one of this size; else None."""
        if not self._dead_references or self.state is not RegionState.OPEN:
            return None
        watch = self._dead_references.pop()
        if watch.is_in_doubt:
            self.close()
        elif watch.size_bytes == size_bytes and self._is_current(watch):
            return self._make_block(watch.offset, size_bytes)
        self._dead_references.append(watch)
        return None

    def collect(self) -> None:
        """Make room of the blocks that have gone."""
        while self._dead_references:
            watch = self._dead_references.popleft()
            if self._is_current(watch):
                self._free(watch)

    def recover(self) -> None:
        """Make room of all blocks that have gone, of those too that an interrupt has kept from being used."""
        self._dead_references.clear()
        for offset in self._arena.offsets:
            watch = self._references.get(offset)
            if watch is None:
                self._arena.free(offset)
            elif watch() is None:
                self._free(watch)

    def close(self) -> None:
        """Take no more blocks."""
        self.state = RegionState.CLOSED

    def _make_block(self, offset: int, size_bytes: int) -> BorrowedBlock:
        block = BorrowedBlock(self, offset)
        watch = _BlockReference(block, self._dead_references.append)
        watch.offset, watch.size_bytes = offset, size_bytes
        watch.is_in_doubt = False
        self._references[offset] = block.reference = watch
        return block

    def _is_current(self, watch: _BlockReference) -> bool:
        """Return whether a block's memory has not been another's since."""
        return self._references.get(watch.offset) is watch

    def _free(self, watch: _BlockReference) -> None:
        if watch.is_in_doubt:
            self.close()
        self._references.pop(watch.offset, None)
        self._arena.free(watch.offset)

    def contains(self, address: int, size_bytes: int) -> bool:
        """Return whether memory lies wholly in it."""
        begin = address - self.address
        return 0 <= begin <= self.size_bytes - size_bytes


class HostRegion(BorrowedRegion):
    """Memory of the host.

    Args:
        memory: The mapping; it stays mapped for as long as a block is in use.
    """

    def __init__(self, name: bytes, memory: mmap.mmap) -> None:
        super().__init__(name, np.frombuffer(memory, np.uint8).ctypes.data, len(memory))
        self.memory = memory
        with suppress(OSError):  # where the system gives such memory no huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)

    def array(self, block: BorrowedBlock, spec: TensorSpec) -> Array:
        """Return a block as an array. See `Region`."""
        array: Array = np.asarray(_ArrayInterface(block, spec))
        return array if array.dtype == spec.dtype else array.view(spec.dtype)  # bfloat16

    def unmap(self) -> None:
        """Leave the mapping to the garbage collector: the server does not need it to end first."""


class _ArrayInterface:
    """A block's elements, as numpy takes them: numpy makes all views refer to this."""

    __slots__ = ("__array_interface__", "_block")

    def __init__(self, block: BorrowedBlock, spec: TensorSpec) -> None:
        self._block = block
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "typestr": spec.dtype.str,
            "shape": spec.shape,
            "data": (block.region.address + block.offset, False),
        }


class RegionPool:
    """Regions of borrowed memory. Its borrower calls the methods under one lock.

    Attributes:
        regions: All of them; replaced whole, so that it can be read without the lock.
    """

    def __init__(self) -> None:
        self.regions: tuple[BorrowedRegion, ...] = ()

    @property
    def open_bytes(self) -> int:
        """Size of the regions that take new blocks: those that broken calls have closed go back soon."""
        return sum(region.size_bytes for region in self.regions if region.state is RegionState.OPEN)

    def reuse_last(self, size_bytes: int) -> BorrowedBlock | None:
        """Return a block that has just gone, if it is of the right size and nothing is to be tidied."""
        for region in self.regions:
            if region.state is RegionState.CLOSED:
                return None
        for region in self.regions:
            block = region.reuse_last(size_bytes)
            if block is not None:
                return block
        return None

    def allocate(self, size_bytes: int) -> BorrowedBlock | None:
        """Return a new block; None if there is no room for it."""
        for region in self.regions:
            block = region.allocate(size_bytes)
            if block is not None:
                return block
        return None

    def collect(self) -> None:
        """Make room of the blocks that have gone."""
        for region in self.regions:
            region.collect()

    def recover(self) -> None:
        """Make room of all blocks that have gone, of those too that an interrupt has kept from being used."""
        for region in self.regions:
            region.recover()

    @property
    def has_unused(self) -> bool:
        """Whether a region is to be given back: it takes no new blocks, and has none."""
        return any(
            region.is_empty and region.state is RegionState.CLOSED for region in self.regions
        )

    def add(self, region: BorrowedRegion) -> None:
        """Add a region that was borrowed."""
        self.regions += (region,)

    def withdraw(self, is_unused: Callable[[BorrowedRegion], bool]) -> list[BorrowedRegion]:
        """Remove empty regions, and return them, to be given back."""
        self.recover()
        unused = [region for region in self.regions if region.is_empty and is_unused(region)]
        self.regions = tuple(region for region in self.regions if region not in unused)
        return unused

    def clear(self) -> None:
        """Forget all regions."""
        self.regions = ()

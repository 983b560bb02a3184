"""Regions: pieces of memory that the server lends, and the arrays in them. Nothing here talks to the server."""

from __future__ import annotations

import mmap
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import Any, Final

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd.wire.shared_slice import SharedSlice
from deconvd_client.shared_memory.arena import Arena

__all__ = ["BorrowedBlock", "BorrowedRegion", "HostRegion", "RegionPool", "RegionState"]

_SEARCHED_COUNT: Final = 8
"""Among how many blocks that have gone `BorrowedRegion.reuse` looks: more than a call has operands and results."""


class RegionState(Enum):
    """Whether a region takes new blocks.

    OPEN --a call ended in an unknown way--> CLOSED --its last block is freed--> given back
    """

    OPEN = "open"
    CLOSED = "closed"
    """A call may still write to a part of it, so it takes no new blocks. The blocks that it has stay."""


class BorrowedBlock:
    """The memory of one array. It is free again once this object has been collected.

    The array refers to it, and so do all views of the array: it goes with the last of them.

    Attributes:
        region: The region that it is in. The region stays mapped for as long as this object lives.
        offset: Where it begins there, in bytes.
        shared_slice: The same, for the server.
        reference: Notices when this object has gone.
    """

    __slots__ = (
        "__array_interface__",
        "__weakref__",
        "offset",
        "reference",
        "region",
        "shared_slice",
    )
    __array_interface__: dict[
        str, Any
    ]  # set on the host alone: numpy makes all views refer to self

    def __init__(
        self,
        region: BorrowedRegion,
        offset: int,
        size_bytes: int,
        on_end: Callable[[_BlockReference], None],
    ) -> None:
        self.region: BorrowedRegion = region
        self.offset: int = offset
        self.shared_slice: SharedSlice = SharedSlice(region.name, offset)
        reference = _BlockReference(self, on_end)
        reference.offset, reference.size_bytes, reference.is_in_doubt = offset, size_bytes, False
        reference.field = ""
        # last: an interrupt before this line also drops the reference, and nobody sees a part of it
        self.reference: _BlockReference = reference


class _BlockReference(weakref.ref[BorrowedBlock]):
    """Notices when a block has gone.

    The callback is a method of a list, not a function of ours. A block may go in any thread, also one that holds the
    borrower's lock. An interrupt that struck code of ours there would be lost, and the block with it.

    Attributes:
        is_in_doubt: Whether the server may still write to the block: then no other array may get its memory. A call
            sets it before it begins and clears it when it has ended, so that nothing has to be done if it is broken
            off.
        field: The field of a call's operand or result that the block is for; empty for an array of the caller's.
    """

    __slots__ = ("field", "is_in_doubt", "offset", "size_bytes")
    field: str
    is_in_doubt: bool
    offset: int
    size_bytes: int


class BorrowedRegion(ABC):
    """A piece of memory that the server has lent. Its borrower calls it under one lock.

    Args:
        name: The secret by which the server knows it.
        address: Where it begins in this process.
        size_bytes: Its size, a multiple of the page size.
    """

    def __init__(self, name: bytes, address: int, size_bytes: int) -> None:
        self.name = name
        self.address = address
        self.size_bytes = size_bytes
        self.state: RegionState = RegionState.OPEN
        self._arena = Arena(size_bytes)
        self._references: dict[int, _BlockReference] = {}  # of the blocks in use, by their offsets
        self._dead_references: deque[_BlockReference] = deque()  # of the blocks that have gone

    @abstractmethod
    def array(self, block: BorrowedBlock, spec: TensorSpec) -> Array:
        """Return a block as an array, which refers to the block. To be called once for each block."""

    @abstractmethod
    def unmap(self) -> None:
        """Close the memory on this side: it is about to be given back."""

    @property
    def is_empty(self) -> bool:
        """Whether no block is in use."""
        return self._arena.is_empty

    @property
    def allocated_bytes(self) -> int:
        """Size of the blocks in use, rounded up as the arena does."""
        return self._arena.allocated_bytes

    def allocate(self, size_bytes: int) -> BorrowedBlock | None:
        """Return a new block; None if there is no room for it."""
        if self.state is not RegionState.OPEN:
            return None
        offset = self._arena.allocate(size_bytes)
        if offset is None:
            return None
        block = BorrowedBlock(self, offset, size_bytes, self._dead_references.append)
        self._references[offset] = block.reference
        return block

    def reuse(self, size_bytes: int, field: str = "") -> BorrowedBlock | None:
        """Return a new block in the place of one that has just gone and was like it; None if there is none.

        This is the quick way of a loop of like calls: the arena is not asked, and each tensor has its place of the call
        before. So a server gets a request that it knows.

        Args:
            field: The block that has gone must have been for this field.
        """
        if self.state is not RegionState.OPEN:
            return None
        dead = self._dead_references  # other threads append to it at any time, and remove nothing
        for index in range(min(len(dead), _SEARCHED_COUNT)):
            reference = dead[index]
            if reference.is_in_doubt:
                self.close()  # `collect` frees its block
                return None
            offset = reference.offset
            is_like = reference.size_bytes == size_bytes and reference.field == field
            if is_like and self._references.get(offset) is reference:
                del dead[index]
                block = BorrowedBlock(self, offset, size_bytes, dead.append)
                block.reference.field = field
                self._references[offset] = block.reference
                return block
        return None

    def collect(self) -> None:
        """Free the blocks that have gone."""
        while self._dead_references:
            reference = self._dead_references.popleft()
            # if an interrupt has made `recover` free it before, its offset may be another block's now
            if self._references.get(reference.offset) is reference:
                self._free(reference)

    def recover(self) -> None:
        """Free the blocks that have gone, and those that an interrupt kept from ever being used."""
        self._dead_references.clear()
        for offset in self._arena.offsets:
            reference = self._references.get(offset)
            if reference is None:
                self._arena.free(offset)
            elif reference() is None:
                self._free(reference)

    def close(self) -> None:
        """Take no new blocks from now on."""
        self.state = RegionState.CLOSED

    def contains(self, address: int, size_bytes: int) -> bool:
        """Return whether the whole of some memory is in this region."""
        return 0 <= address - self.address <= self.size_bytes - size_bytes

    def _free(self, reference: _BlockReference) -> None:
        if reference.is_in_doubt:
            self.close()
        self._references.pop(reference.offset, None)
        self._arena.free(reference.offset)


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
        """See `BorrowedRegion`."""
        block.__array_interface__ = {
            "version": 3,
            "typestr": spec.dtype.str,
            "shape": spec.shape,
            "data": (self.address + block.offset, False),
        }
        array: Array = np.asarray(block)
        return array if array.dtype == spec.dtype else array.view(spec.dtype)  # bfloat16

    def unmap(self) -> None:
        """Leave the mapping to the garbage collector: the server does not wait for its end."""


class RegionPool:
    """Regions of borrowed memory. Its borrower calls the methods under one lock.

    Attributes:
        regions: All of them. The tuple is replaced, never changed, so that it can be read without the lock.
    """

    def __init__(self) -> None:
        self.regions: tuple[BorrowedRegion, ...] = ()

    @property
    def open_bytes(self) -> int:
        """Size of the open regions: closed ones will be given back soon."""
        return sum(region.size_bytes for region in self.regions if region.state is RegionState.OPEN)

    def reuse(self, size_bytes: int, field: str = "") -> BorrowedBlock | None:
        """Return a block in the place of one that has just gone; None if none is alike, or a region must be tidied."""
        for region in self.regions:
            if region.state is RegionState.CLOSED:
                return None
        for region in self.regions:
            block = region.reuse(size_bytes, field)
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
        """Free the blocks that have gone."""
        for region in self.regions:
            region.collect()

    def recover(self) -> None:
        """Free the blocks that have gone, and those that an interrupt kept from ever being used."""
        for region in self.regions:
            region.recover()

    @property
    def has_unused(self) -> bool:
        """Whether a region should be given back: it is closed, and no block is left in it."""
        return any(
            region.is_empty and region.state is RegionState.CLOSED for region in self.regions
        )

    def add(self, region: BorrowedRegion) -> None:
        """Add a region that was borrowed."""
        self.regions += (region,)

    def withdraw(self, is_unused: Callable[[BorrowedRegion], bool]) -> list[BorrowedRegion]:
        """Remove the empty regions for which `is_unused` holds, and return them, to be given back."""
        self.recover()
        unused = [region for region in self.regions if region.is_empty and is_unused(region)]
        self.regions = tuple(region for region in self.regions if region not in unused)
        return unused

    def clear(self) -> None:
        """Forget all regions."""
        self.regions = ()

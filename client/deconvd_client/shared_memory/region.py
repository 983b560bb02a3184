"""A stretch of memory that the server lent, and the arrays in it."""

from __future__ import annotations

import mmap
from collections import deque
from contextlib import suppress
from enum import Enum
from typing import Any

import numpy as np

from deconvd.problem import TensorSpec
from deconvd.tensor import Array
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.shared_memory.arena import Arena

__all__ = ["Block", "Region", "State"]


class State(Enum):
    """What a region is good for.

    OPEN --a call ended nobody knows how--> CLOSED --its last block freed--> given back
    """

    OPEN = "open"
    CLOSED = "closed"
    """A call may still write into a part of it, so it has no room for more. What it holds stays."""


class Block:
    """One array's memory. It is free again once this, which is the base of the array, has gone.

    numpy makes views refer to it, so that is when the last of them has gone.
    """

    __slots__ = ("__array_interface__", "offset", "region")

    def __init__(self, region: Region, offset: int, size_bytes: int) -> None:
        self.region = region  # whose memory is mapped for as long as this is
        self.offset = offset
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "typestr": "|u1",
            "shape": (size_bytes,),
            "data": (region.address + offset, False),
        }

    def __del__(self) -> None:
        # Whatever thread this is, it may hold the borrower's lock: no more than this may happen here.
        self.region.freed.append(self.offset)

    def array(self, spec: TensorSpec) -> Array:
        """Return the memory as an array."""
        return np.asarray(self).view(spec.dtype).reshape(spec.shape)

    @property
    def message(self) -> pb.SharedSlice:
        """Where it is, for the server."""
        return pb.SharedSlice(region=self.region.name, offset_bytes=self.offset)


class Region:
    """One piece of memory that the server lent. Its borrower calls it under one lock.

    Args:
        name: The secret by which the server knows it.
        memory: The mapping; it stays mapped for as long as a block is in use.

    Attributes:
        freed: Offsets of blocks that have gone, as they went; `collect` makes room of them.
    """

    def __init__(self, name: bytes, memory: mmap.mmap) -> None:
        self.name = name
        self.memory = memory
        self.size_bytes = len(memory)
        self.address: int = np.frombuffer(memory, np.uint8).ctypes.data
        self.state = State.OPEN
        self.freed: deque[int] = deque()
        self._arena = Arena(self.size_bytes)
        with suppress(OSError):  # where the system gives such memory no huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)

    @property
    def is_empty(self) -> bool:
        """Whether no block is in use."""
        return self._arena.is_empty

    @property
    def taken_bytes(self) -> int:
        """What blocks take."""
        return self._arena.taken_bytes

    def take(self, size_bytes: int) -> Block | None:
        """Return a new block; None if there is no room for it."""
        if self.state is not State.OPEN:
            return None
        offset = self._arena.take(size_bytes)
        return None if offset is None else Block(self, offset, size_bytes)

    def collect(self) -> None:
        """Make room of the blocks that have gone."""
        while self.freed:
            self._arena.give(self.freed.popleft())

    def close(self) -> None:
        """Take no more blocks."""
        self.state = State.CLOSED

    def holds(self, address: int, size_bytes: int) -> bool:
        """Return whether memory lies wholly in it."""
        begin = address - self.address
        return 0 <= begin <= self.size_bytes - size_bytes

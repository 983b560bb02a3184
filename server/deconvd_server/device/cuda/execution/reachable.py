"""Brings the tensors of a large call where the card reaches them: arrays that it does not reach are mirrored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from deconvd.model.dtypes import Array
from deconvd_server.device.arriving import Operand, OverlappedOperands, peek_tensor
from deconvd_server.device.cuda.api.host_memory import RegisteredMemory
from deconvd_server.device.cuda.api.memory import BlockLayout
from deconvd_server.device.cuda.api.runtime import Bytes

__all__ = ["ReachableMemory", "ReachableTensor"]

_MIRRORED_BYTES: Final = 1 << 20
"""The most bytes of a call that are mirrored. Copying them takes as long as handing a copy to other threads."""

_SMALL_BYTES: Final = 16 << 10
"""Arrays up to this size are mirrored wherever they are: that takes less time than to look them up."""


class ReachableTensor(NamedTuple):
    """A tensor that the card reaches.

    Attributes:
        operand: A tensor on the card, an array in registered memory, or an array's mirror.
        registered: The array, if it is in registered memory; else None. The next call of the same kind may have it at
            another address, where mirrors stay in place.
    """

    operand: Operand
    registered: Array | None = None


class ReachableMemory:
    """The host memory that the card reads and writes by itself.

    Args:
        registered: Memory that is registered with CUDA.
        pinned: Memory for the mirrors of one call at a time.
    """

    def __init__(self, registered: RegisteredMemory, pinned: Bytes) -> None:
        self._registered = registered
        self._pinned = pinned

    @property
    def generation(self) -> int:
        """See `RegisteredMemory`."""
        return self._registered.generation

    def holds(self, array: Array) -> bool:
        """Return whether the card should copy an array from or to its own place."""
        return array.nbytes > _SMALL_BYTES and self._registered.holds(array)

    def make_reachable(
        self,
        tensors: Sequence[Operand],
        mirrors: BlockLayout,
        overlapped: OverlappedOperands | None,
    ) -> list[ReachableTensor] | None:
        """Return operands or results where the card reaches them; None if too many bytes would have to be mirrored.

        The mirrors of operands are filled. Mirrors of results are for the caller to copy to the results.

        Args:
            mirrors: The layout of the call's mirrors in pinned memory. New ones are added.
            overlapped: Waits for operands that are mirrored; None for results.
        """
        reachable: list[ReachableTensor] = []
        for tensor in tensors:
            array = peek_tensor(tensor)
            if not isinstance(array, np.ndarray):
                reachable.append(ReachableTensor(tensor))
            elif self.holds(array):
                reachable.append(ReachableTensor(tensor, registered=array))
            else:
                region = mirrors.add(array.nbytes)
                if mirrors.total_bytes > _MIRRORED_BYTES:
                    return None
                dtype = array.dtype.newbyteorder("=")
                mirror = np.ndarray(array.shape, dtype, self._pinned, region.offset)
                if overlapped is not None:
                    overlapped.wait_for_all(tensor)
                    mirror[...] = array
                reachable.append(ReachableTensor(mirror))
        return reachable

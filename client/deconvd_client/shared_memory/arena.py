"""An allocator of ranges: which parts of a region are in use. It handles only numbers, not the memory itself."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Final

__all__ = ["Arena"]

_LINE_BYTES: Final = 64
_PAGE_BYTES: Final = 4096
_MIN_PAGED_BYTES: Final = 16 * _PAGE_BYTES
"""Blocks of at least this size are whole pages: a device may copy them faster, and smaller gaps are left."""


class Arena:
    """Allocates blocks of a region by best fit. Not thread-safe.

    Blocks begin at multiples of 64 bytes; those of 64 KiB and more at multiples of 4096. Adjacent free ranges are
    merged. An interrupt may end a method anywhere. So `_allocated` alone is authoritative and is changed in one step;
    the free ranges are computed again from it if a method did not reach its end.

    Args:
        size_bytes: Size of the region, a multiple of the page size.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._free_ranges: list[tuple[int, int]] = [(0, size_bytes)]  # begin and end, sorted
        self._allocated: dict[int, int] = {}  # end of each block, by its offset
        self._is_consistent = True  # whether the free ranges are the gaps between the blocks

    @property
    def offsets(self) -> list[int]:
        """Where the allocated blocks begin."""
        return [*self._allocated]

    @property
    def allocated_bytes(self) -> int:
        """Size of all blocks, each rounded up to its alignment."""
        return sum(end - begin for begin, end in self._allocated.items())

    @property
    def is_empty(self) -> bool:
        """Whether no block is allocated."""
        return not self._allocated

    def allocate(self, size_bytes: int) -> int | None:
        """Return the offset of a new block of at least `size_bytes` (more than 0); None if there is no room."""
        self._rebuild_free_ranges()
        grain = _PAGE_BYTES if size_bytes >= _MIN_PAGED_BYTES else _LINE_BYTES
        size = _round_up(size_bytes, grain)
        fitting = (
            (end - begin, begin, end)
            for begin, end in self._free_ranges
            if _round_up(begin, grain) + size <= end
        )
        best = min(fitting, default=None)
        if best is None:
            return None
        _, begin, end = best
        offset = _round_up(begin, grain)
        self._is_consistent = False
        self._free_ranges.remove((begin, end))
        for rest in ((begin, offset), (offset + size, end)):
            if rest[0] < rest[1]:
                insort(self._free_ranges, rest)
        self._allocated[offset] = offset + size
        self._is_consistent = True
        return offset

    def free(self, offset: int) -> None:
        """Free a block. Raises KeyError if no block begins at `offset`."""
        self._rebuild_free_ranges()
        begin, end = offset, self._allocated[offset]
        self._is_consistent = False
        del self._allocated[offset]
        at = bisect_left(self._free_ranges, (begin, end))
        if at < len(self._free_ranges) and self._free_ranges[at][0] == end:
            end = self._free_ranges.pop(at)[1]
        if at > 0 and self._free_ranges[at - 1][1] == begin:
            begin = self._free_ranges.pop(at - 1)[0]
        insort(self._free_ranges, (begin, end))
        self._is_consistent = True

    def _rebuild_free_ranges(self) -> None:
        """Compute the free ranges again if a method was interrupted."""
        if self._is_consistent:
            return
        free: list[tuple[int, int]] = []
        begin = 0
        for offset, end in [*sorted(self._allocated.items()), (self.size_bytes, self.size_bytes)]:
            if begin < offset:
                free.append((begin, offset))
            begin = end
        self._free_ranges = free
        self._is_consistent = True


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

"""Which parts of a stretch of memory are taken. Only numbers: no memory here."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Final

__all__ = ["Arena"]

_LINE_BYTES: Final = 64
_PAGE_BYTES: Final = 4096
_MIN_PAGED_BYTES: Final = 16 * _PAGE_BYTES
"""From this size on, blocks are whole pages: a device may copy them faster, and less is left in between."""


class Arena:
    """Gives out blocks of a stretch of memory, the tightest that fits. Not thread-safe.

    Blocks begin at multiples of 64 bytes, of 4096 from 64 KiB on; free neighbours become one. An
    interrupt may end a method anywhere: `_allocated` alone is the truth, changed in one step, and what
    is free is found anew from it if a method did not come to its end.

    Args:
        size_bytes: A multiple of the page size, which is that of the stretch.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._free_ranges: list[tuple[int, int]] = [(0, size_bytes)]  # begin and end, in order
        self._allocated: dict[int, int] = {}
        self._is_consistent = True  # whether the free stretches are those between the taken

    @property
    def offsets(self) -> list[int]:
        """Of all blocks that are taken."""
        return [*self._allocated]

    @property
    def allocated_bytes(self) -> int:
        """What blocks take, rounded up as they are."""
        return sum(end - begin for begin, end in self._allocated.items())

    @property
    def is_empty(self) -> bool:
        """Whether no block is taken."""
        return not self._allocated

    def allocate(self, size_bytes: int) -> int | None:
        """Return the offset of a new block of at least `size_bytes`, over 0; None if none is free."""
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
        """Free a block. Raises KeyError if there is none at `offset`."""
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
        """Find anew what is free, if a method was interrupted."""
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

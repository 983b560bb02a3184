"""Which parts of a stretch of memory are taken. Only numbers: no memory here."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Final

__all__ = ["Arena"]

_LINE_BYTES: Final = 64
_PAGE_BYTES: Final = 4096
_PAGED_BYTES: Final = 16 * _PAGE_BYTES
"""From this size on, blocks are whole pages: a device may copy them faster, and less is left in between."""


class Arena:
    """Gives out blocks of a stretch of memory, the tightest that fits. Not thread-safe.

    Blocks begin at multiples of 64 bytes, of 4096 from 64 KiB on; free neighbours become one. An
    interrupt may end a method anywhere: `_taken` alone is the truth, changed in one step, and what
    is free is found anew from it if a method did not come to its end.

    Args:
        size_bytes: A multiple of the page size, which is that of the stretch.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._free: list[tuple[int, int]] = [(0, size_bytes)]  # begin and end, in order
        self._taken: dict[int, int] = {}
        self._is_settled = True  # whether the free stretches are those between the taken

    @property
    def offsets(self) -> list[int]:
        """Of all blocks that are taken."""
        return [*self._taken]

    @property
    def taken_bytes(self) -> int:
        """What blocks take, rounded up as they are."""
        return sum(end - begin for begin, end in self._taken.items())

    @property
    def is_empty(self) -> bool:
        """Whether no block is taken."""
        return not self._taken

    def take(self, size_bytes: int) -> int | None:
        """Return the offset of a new block of at least `size_bytes`, over 0; None if none is free."""
        self._settle()
        grain = _PAGE_BYTES if size_bytes >= _PAGED_BYTES else _LINE_BYTES
        size = _rounded_up(size_bytes, grain)
        fitting = (
            (end - begin, begin, end)
            for begin, end in self._free
            if _rounded_up(begin, grain) + size <= end
        )
        best = min(fitting, default=None)
        if best is None:
            return None
        _, begin, end = best
        offset = _rounded_up(begin, grain)
        self._is_settled = False
        self._free.remove((begin, end))
        for rest in ((begin, offset), (offset + size, end)):
            if rest[0] < rest[1]:
                insort(self._free, rest)
        self._taken[offset] = offset + size
        self._is_settled = True
        return offset

    def give(self, offset: int) -> None:
        """Free a block. Raises KeyError if there is none at `offset`."""
        self._settle()
        begin, end = offset, self._taken[offset]
        self._is_settled = False
        del self._taken[offset]
        at = bisect_left(self._free, (begin, end))
        if at < len(self._free) and self._free[at][0] == end:
            end = self._free.pop(at)[1]
        if at > 0 and self._free[at - 1][1] == begin:
            begin = self._free.pop(at - 1)[0]
        insort(self._free, (begin, end))
        self._is_settled = True

    def _settle(self) -> None:
        """Find anew what is free, if a method was interrupted."""
        if self._is_settled:
            return
        free: list[tuple[int, int]] = []
        begin = 0
        for offset, end in [*sorted(self._taken.items()), (self.size_bytes, self.size_bytes)]:
            if begin < offset:
                free.append((begin, offset))
            begin = end
        self._free = free
        self._is_settled = True


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

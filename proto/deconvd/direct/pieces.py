"""The pieces of a striped call: how the elements of its tensors are divided among several connections. Pure.

The elements of all tensors that travel one way, one tensor after the other, are a space of bytes. It is cut into pieces
of equal size, and only the last piece may be smaller:

    tensors     | W      | x                                        |
    pieces      | 0               | 1               | 2             |

Each piece is sent once, by any of the call's stripes, alone or in a run of consecutive pieces. See
`deconvd.direct.protocol`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import numpy as np

from deconvd.model.dtypes import Array

__all__ = ["PIECE_BYTES", "PieceSpace", "run_length"]

PIECE_BYTES: Final = 2 << 20
"""Size of a piece: so large that its cost is small, and so small that a card can follow those that have arrived."""

_LONG_RUN_LENGTH: Final = 4
_MAX_LONG_RUN_STRIPES: Final = 2


def run_length(stripes_count: int, pieces_count: int) -> int:
    """Return how many of some pieces a run should have, if so many may be sent. Each stripe should get one.

    Calls have two stripes while many are made at once. Each run takes a few system calls, after each of which a thread
    waits for the interpreter's lock with those of the other calls, so long runs are faster. With more stripes a call is
    alone, and a card follows its pieces: they should arrive nearly in order.
    """
    if stripes_count > _MAX_LONG_RUN_STRIPES:
        return 1
    return min(max(-(-pieces_count // stripes_count), 1), _LONG_RUN_LENGTH)


class PieceSpace:
    """The elements of some arrays as one space of bytes, in pieces.

    Attributes:
        size_bytes: The size of all arrays together.
        pieces_count: How many pieces they have.

    Args:
        arrays: C-contiguous, in the order of the space.
    """

    def __init__(self, arrays: Sequence[Array]) -> None:
        self._views = [array.reshape(-1).view(np.uint8).data for array in arrays if array.nbytes]
        ends = [*accumulate(map(len, self._views))]
        self._begins = [0, *ends[:-1]]
        self.size_bytes = ends[-1] if ends else 0
        self.pieces_count = -(-self.size_bytes // PIECE_BYTES)

    def count_before(self, end_bytes: int) -> int:
        """Return how many pieces end at or before a byte of the space."""
        return self.pieces_count if end_bytes == self.size_bytes else end_bytes // PIECE_BYTES

    def bytes_before(self, number: int) -> int:
        """Return how many bytes come before a piece; before the number behind the last one, all."""
        return min(number * PIECE_BYTES, self.size_bytes)

    def count_in_run(self, number: int, size_bytes: int) -> int:
        """Return how many pieces a run has, given its first piece and its size. 0 if there is no such run."""
        begin, end = number * PIECE_BYTES, number * PIECE_BYTES + size_bytes
        is_whole = end == self.size_bytes or (end < self.size_bytes and end % PIECE_BYTES == 0)
        return self.count_before(end) - number if is_whole and begin < end else 0

    def buffers(self, number: int, count: int = 1) -> list[memoryview]:
        """Return the memory of a run of pieces, in order: one part of each array that it has elements of."""
        begin = number * PIECE_BYTES
        end = self.bytes_before(number + count)
        buffers: list[memoryview] = []
        for at in range(bisect_right(self._begins, begin) - 1, len(self._views)):
            view, view_begin = self._views[at], self._begins[at]
            if view_begin >= end:
                break
            buffers.append(view[max(begin - view_begin, 0) : end - view_begin])
        return buffers

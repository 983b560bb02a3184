"""The pieces of a striped call: how the elements of its tensors are divided among several connections. Pure.

The elements of all tensors that travel one way, one tensor after the other, are a space of bytes. It is cut into pieces
of equal size, and only the last piece may be smaller:

    tensors     | W      | x                                        |
    pieces      | 0               | 1               | 2             |

Each piece is sent once, by any of the call's stripes. See `deconvd.direct.protocol`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import numpy as np

from deconvd.model.dtypes import Array

__all__ = ["PIECE_BYTES", "PieceSpace"]

PIECE_BYTES: Final = 2 << 20
"""Size of a piece: so large that its cost is small, and so small that a card can follow those that have arrived."""


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

    def piece_bytes(self, number: int) -> int:
        """Return the size of a piece."""
        return min(PIECE_BYTES, self.size_bytes - number * PIECE_BYTES)

    def buffers(self, number: int) -> list[memoryview]:
        """Return a piece's memory, in order: one part of each array that it has elements of."""
        begin = number * PIECE_BYTES
        end = begin + self.piece_bytes(number)
        buffers: list[memoryview] = []
        for at in range(bisect_right(self._begins, begin) - 1, len(self._views)):
            view, view_begin = self._views[at], self._begins[at]
            if view_begin >= end:
                break
            buffers.append(view[max(begin - view_begin, 0) : end - view_begin])
        return buffers

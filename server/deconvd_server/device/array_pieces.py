"""Cuts arrays of any size into pieces of one step of work. For pieces that fit in memory see `pieces`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from deconvd.model.dtypes import Array

__all__ = ["PIECE_ELEMENTS", "copy_in_pieces", "piece_indices"]

PIECE_ELEMENTS: Final = 1 << 22
"""Elements that a processor copies or casts in some milliseconds. A call is checked once in each piece."""


def piece_indices(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yield the indices of pieces that cover an array of a shape. A large array is cut along its longest axis."""
    count = math.prod(shape)
    if count <= PIECE_ELEMENTS:
        yield ()
        return
    axis = int(np.argmax(shape))
    before = (slice(None),) * axis
    step = max(shape[axis] * PIECE_ELEMENTS // count, 1)
    for start in range(0, shape[axis], step):
        yield *before, slice(start, min(start + step, shape[axis]))


def copy_in_pieces(target: Array, source: Array | int) -> Iterator[None]:
    """Copy an array, or a number, into another array whose shape it can take, a piece at a time."""
    whole = np.broadcast_to(source, target.shape)
    for piece in piece_indices(target.shape):
        target[piece] = whole[piece]
        yield

"""Copies between arrays that are large enough for several threads: one moves less than memory and the bus can."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from deconvd.system import call_in_forked_children, processors_count

__all__ = ["copy_into"]

_PIECE_BYTES: Final = 2 << 20
"""A thread is worth its while from about this size on, and one that wakes late leaves its pieces to the others."""

_MAX_THREADS_COUNT: Final = 8
"""One moves 7 to 11 GB/s; beyond this many, the memory's own speed is the limit."""


def copy_into(target: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
    """Copy `source` into `target`, of the same shape and, up to byte order, the same type.

    They must not overlap. numpy releases the interpreter's lock for each piece.
    """
    pieces_count = target.nbytes // _PIECE_BYTES
    threads_count = min(pieces_count, _threads_count())
    if threads_count < 2:
        np.copyto(target, source)
        return
    pieces = _pieces(target, source, pieces_count)
    others = [_pool.get().submit(_copy_all, pieces) for _ in range(threads_count - 1)]
    _copy_all(pieces)
    for other in others:
        other.result()


class _Pieces(NamedTuple):
    """Two arrays and the pieces of one axis that are still to be copied.

    Attributes:
        before: Selects all of each axis before that one.
        length: Of a piece along the axis.
    """

    target: npt.NDArray[Any]
    source: npt.NDArray[Any]
    before: tuple[slice, ...]
    length: int
    begins: Iterator[int]


def _copy_all(pieces: _Pieces) -> None:
    """Copy pieces until none is left, beside other threads that do the same."""
    for begin in pieces.begins:  # a range's iterator gives each number once, whichever thread asks
        piece = (*pieces.before, slice(begin, begin + pieces.length))
        np.copyto(pieces.target[piece], pieces.source[piece])


def _pieces(target: npt.NDArray[Any], source: npt.NDArray[Any], count: int) -> _Pieces:
    """Return about as many pieces: along all elements where both arrays allow it, else the longest axis."""
    if target.flags.c_contiguous and source.flags.c_contiguous:
        target, source = target.reshape(-1), source.reshape(-1)
    axis = int(np.argmax(target.shape))
    extent = target.shape[axis]
    length = -(-extent // count)
    return _Pieces(target, source, (slice(None),) * axis, length, iter(range(0, extent, length)))


def _threads_count() -> int:
    return min(processors_count(), _MAX_THREADS_COUNT)


class _Pool:
    """Threads that copy, started at the first need, and anew in a child process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        call_in_forked_children(self.forget)

    def get(self) -> ThreadPoolExecutor:
        """Return the threads."""
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(_MAX_THREADS_COUNT - 1, "copy")
            return self._executor

    def forget(self) -> None:
        """Start over: a forked child has none of its parent's threads."""
        self._lock = threading.Lock()
        self._executor = None


_pool = _Pool()

"""Copies between arrays that are large enough for several threads: one moves less than memory and the bus can."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from deconvd.system import call_in_forked_children, processors_count

__all__ = ["copy_into"]

_PIECE_BYTES: Final = 4 << 20
"""A thread is worth its while from about this size on."""

_MAX_THREADS_COUNT: Final = 8
"""One moves 7 to 11 GB/s; beyond this many, the memory's own speed is the limit."""


def copy_into(target: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
    """Copy `source` into `target`, of the same shape and, up to byte order, the same type.

    They must not overlap. numpy releases the interpreter's lock for each piece.
    """
    pieces_count = min(target.nbytes // _PIECE_BYTES, _threads_count())
    if pieces_count < 2:
        np.copyto(target, source)
        return
    pieces = list(zip(*_split(target, source, pieces_count), strict=True))
    others = [_pool.get().submit(np.copyto, *piece) for piece in pieces[1:]]
    np.copyto(*pieces[0])
    for other in others:
        other.result()


def _split(
    target: npt.NDArray[Any], source: npt.NDArray[Any], count: int
) -> tuple[list[npt.NDArray[Any]], list[npt.NDArray[Any]]]:
    """Return views of about equal size: along all elements where both allow it, else the longest axis."""
    if target.flags.c_contiguous and source.flags.c_contiguous:
        target, source = target.reshape(-1), source.reshape(-1)
    axis = int(np.argmax(target.shape))
    return np.array_split(target, count, axis), np.array_split(source, count, axis)


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

"""Copies of large arrays by several threads: one thread cannot use the full bandwidth of the memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from deconvd.host.forks import new_lock, register_fork_reset
from deconvd.host.system import processors_count

__all__ = ["copy_all", "copy_into"]

_Array: TypeAlias = npt.NDArray[Any]

_PIECE_BYTES: Final = 2 << 20
"""Size of a piece.

It does not pay off to wake a thread for less. Pieces are small, so that the others can do the work of a thread that
wakes late.
"""

_FEW_THREADS_COUNT: Final = 4
"""Threads for a copy of less than `_MANY_THREADS_BYTES`."""

_MAX_THREADS_COUNT: Final = 8
"""Threads for a larger copy."""

_ABANDON_POLL_S: Final = 2e-4
"""How often `abandon` checks whether the other threads have stopped. A piece takes about this long."""

_MANY_THREADS_BYTES: Final = 128 << 20
"""Copies of this size and larger use eight threads, smaller ones four.

One thread moves 7 to 14 GB/s, four move 37, eight move 48, which is the speed of the memory. But a card usually reads
the copy at once, from the caches of the processors that wrote it: at 50 GB/s if four did, as fast as from memory, and
at a third of that if eight did. Only a copy much larger than the caches is mostly in memory when the card reads it.
"""


def copy_into(target: _Array, source: _Array) -> None:
    """Copy `source` into `target`. See `copy_all`."""
    copy_all([(target, source)])


def copy_all(
    pairs: Sequence[tuple[_Array, _Array]], on_progress: Callable[[int], None] | None = None
) -> None:
    """Copy the second array of each pair into the first.

    Both arrays of a pair must have the same shape and, except for the byte order, the same type, and must not overlap.
    numpy releases the interpreter's lock during each piece. When this function raises (an error of `on_progress`, or an
    interrupt), no thread copies any more.

    Args:
        on_progress: Called now and then with the number of bytes that are copied without a gap, counted from the start
            of the first target over all targets in order. The number only grows, and is the total at the end. It is
            called in any thread, but never in two at once, while other threads continue to copy.
    """
    total_bytes = 0
    for target, _ in pairs:
        total_bytes += target.nbytes
    is_small = total_bytes < 2 * _PIECE_BYTES
    threads_count = 1 if is_small else _threads_count(total_bytes)
    if is_small or (threads_count < 2 and on_progress is None):
        for target, source in pairs:
            np.copyto(target, source)
        if on_progress is not None:
            on_progress(total_bytes)
        return
    copy = _CopyJob([*_split_pairs([pair for pair in pairs if pair[0].nbytes], on_progress)])
    try:
        _copy_threads.help(copy, min(copy.pieces_count, threads_count) - 1)
        copy.finish()
    except BaseException:
        copy.abandon()
        raise


def _threads_count(total_bytes: int) -> int:
    """Return how many threads should share a copy that is not small."""
    most_count = _FEW_THREADS_COUNT if total_bytes < _MANY_THREADS_BYTES else _MAX_THREADS_COUNT
    return min(processors_count(), most_count)


def _split_pairs(
    pairs: Sequence[tuple[_Array, _Array]], on_progress: Callable[[int], None] | None
) -> Iterator[_PiecewiseCopy]:
    if on_progress is None:
        for target, source in pairs:
            yield _PiecewiseCopy(target, source)
        return
    total = _TotalProgress(on_progress, [target.nbytes for target, _ in pairs])
    for number, (target, source) in enumerate(pairs):
        yield _PiecewiseCopy(target, source, partial(total.note, number))


class _PiecewiseCopy:
    """The copy of one array, divided into pieces along its longest axis.

    Args:
        note: Called with the number of bytes of the target that are copied without a gap, from its start.

    Attributes:
        begins: The first index of each piece along the axis.
    """

    def __init__(
        self, target: _Array, source: _Array, note: Callable[[int], None] | None = None
    ) -> None:
        if target.flags.c_contiguous and source.flags.c_contiguous:
            target, source = target.reshape(-1), source.reshape(-1)
        axis = int(np.argmax(target.shape))
        extent = target.shape[axis]
        self._target, self._source = target, source
        self._leading_slices = (slice(None),) * axis
        self._length = max(-(-extent // max(target.nbytes // _PIECE_BYTES, 1)), 1)
        self.begins = range(0, extent, self._length)
        self._progress = note and _PieceProgress(note, target, axis, self._length)

    def copy_piece(self, begin: int) -> None:
        """Copy the piece that begins at an index along the axis."""
        piece = (*self._leading_slices, slice(begin, begin + self._length))
        np.copyto(self._target[piece], self._source[piece])
        if self._progress is not None:
            self._progress.add(begin)


class _CopyJob:
    """Pieces of several arrays. Any number of threads may join the copy; each takes the next piece that is left.

    The piece numbers come from shared iterators. `next()` on one is atomic, so no two threads get the same number, and
    no lock is needed:

        _unclaimed_numbers   0, 1, 2, ...         which piece to copy next
        _remaining_counts    n, n - 1, ..., 1     how many pieces were left when one ended: whoever gets 1 ends the job

    Attributes:
        pieces_count: The number of pieces.
    """

    def __init__(self, all_pieces: Sequence[_PiecewiseCopy]) -> None:
        self._all_pieces = [(pieces, begin) for pieces in all_pieces for begin in pieces.begins]
        self.pieces_count = len(self._all_pieces)
        self._unclaimed_numbers = iter(range(self.pieces_count))
        self._remaining_counts = iter(range(self.pieces_count, 0, -1))
        self._active_threads: set[int] = set()  # identifiers of threads that may be copying
        self._done_lock = threading.Lock()
        self._done_lock.acquire()
        self._errors: list[BaseException] = []

    def run_pieces(self) -> None:
        """Copy pieces until all have been claimed. Other threads may still be copying theirs."""
        self._active_threads.add(threading.get_ident())
        for number in self._unclaimed_numbers:
            try:
                self._copy_piece(number)
            except BaseException as error:  # noqa: BLE001 - `finish` raises it in the caller's thread
                self._errors.append(error)
                self._skip_rest()
            self._end_piece()
        self._active_threads.discard(threading.get_ident())

    def finish(self) -> None:
        """Copy pieces, and return when all are copied. Raises the first error of any thread, which ends the copy."""
        self.run_pieces()
        self._done_lock.acquire()
        # a thread that wakes late may refer to this job for some time, but must not keep the caller's arrays alive
        self._all_pieces.clear()
        if self._errors:
            first, *_ = self._errors
            self._errors.clear()  # the error's traceback refers to this frame: without a cycle, both are freed at once
            try:
                raise first
            finally:
                del first

    def abandon(self) -> None:
        """Stop the copy, and return when no other thread copies any more."""
        for _ in self._unclaimed_numbers:
            pass
        while self._active_threads - {threading.get_ident()}:
            time.sleep(_ABANDON_POLL_S)
        self._all_pieces.clear()

    def _copy_piece(self, number: int) -> None:
        pieces, begin = self._all_pieces[number]
        pieces.copy_piece(begin)

    def _skip_rest(self) -> None:
        for _ in self._unclaimed_numbers:
            self._end_piece()

    def _end_piece(self) -> None:
        if next(self._remaining_counts) == 1:
            self._done_lock.release()


class _TotalProgress:
    """Joins the progress of several arrays into one number, and reports it in one thread at a time.

    Args:
        report: The `on_progress` of `copy_all`.
        sizes_bytes: The sizes of the arrays.
    """

    def __init__(self, report: Callable[[int], None], sizes_bytes: Sequence[int]) -> None:
        self._report = report
        self._sizes_bytes = sizes_bytes
        self._done_bytes = [0] * len(sizes_bytes)
        self._lock = threading.Lock()
        self._reported_bytes = 0
        self._is_reporting = False

    def note(self, number: int, done_bytes: int) -> None:
        """Record that the first `done_bytes` of an array are copied, and report it if no other thread is reporting."""
        with self._lock:
            self._done_bytes[number] = max(done_bytes, self._done_bytes[number])
            if self._is_reporting:
                return  # the thread that reports will report this, too
            self._is_reporting = True
        self._report_new()

    def _report_new(self) -> None:
        """Report the progress, until nothing new has been recorded meanwhile."""
        while True:
            with self._lock:
                done_bytes = self._contiguous_bytes()
                if done_bytes == self._reported_bytes:
                    self._is_reporting = False
                    return
                self._reported_bytes = done_bytes
            self._report(done_bytes)  # without the lock: others go on copying and recording

    def _contiguous_bytes(self) -> int:
        total_bytes = 0
        for size_bytes, done_bytes in zip(self._sizes_bytes, self._done_bytes, strict=True):
            total_bytes += done_bytes
            if done_bytes < size_bytes:
                break
        return total_bytes


class _PieceProgress:
    """The progress of one array whose pieces end in any order.

    Args:
        report: Called with the number of bytes that are copied without a gap, from the start of the target. Calls of
            two threads may overtake each other, so a number may be smaller than the one before.
        axis: The axis along which the array is divided.
        length: Length of a piece along the axis.
    """

    def __init__(
        self, report: Callable[[int], None], target: _Array, axis: int, length: int
    ) -> None:
        self._report = report
        self._is_in_order = target.flags.c_contiguous and axis == 0
        self._row_bytes = target.nbytes // target.shape[axis]
        self._extent, self._length = target.shape[axis], length
        self._lock = threading.Lock()
        self._contiguous_end = 0  # end of the copied pieces without a gap
        self._out_of_order_begins: set[int] = set()  # of copied pieces behind a gap

    def add(self, begin: int) -> None:
        """Record that a piece is copied."""
        with self._lock:
            self._out_of_order_begins.add(begin)
            if begin != self._contiguous_end:
                return
            while self._contiguous_end in self._out_of_order_begins:
                self._out_of_order_begins.remove(self._contiguous_end)
                self._contiguous_end = min(self._contiguous_end + self._length, self._extent)
            end = self._contiguous_end
        # If the axis is not the outermost one, copied pieces are not contiguous in memory before all of them are.
        if self._is_in_order or end == self._extent:
            self._report(end * self._row_bytes)


class _CopyThreads:
    """Threads that help to copy. They start when they are first needed, in a forked child again."""

    def __init__(self) -> None:
        register_fork_reset(self)
        self._lock = new_lock()
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Forget the threads: a forked child has none."""
        self._count = 0
        self._queue: SimpleQueue[_CopyJob] = SimpleQueue()

    def help(self, copy: _CopyJob, count: int) -> None:
        """Have up to `count` threads join a copy as soon as they wake. They do not keep the process alive."""
        for _ in range(min(count, self._start_threads(count))):
            self._queue.put(copy)

    def _start_threads(self, count: int) -> int:
        """Start threads until there are `count`, and return how many there are."""
        with self._lock, suppress(RuntimeError):  # the system allows no more threads: fewer help
            while self._count < count:
                name = f"copy {self._count}"
                threading.Thread(
                    target=_run_copy_thread, args=(self._queue,), name=name, daemon=True
                ).start()
                self._count += 1
        return self._count


def _run_copy_thread(queue: SimpleQueue[_CopyJob]) -> None:
    while True:
        queue.get().run_pieces()  # a variable would keep the arrays alive until the next job


_copy_threads = _CopyThreads()

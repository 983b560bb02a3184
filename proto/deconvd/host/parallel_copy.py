"""Copies between arrays that are large enough for several threads: one moves less than memory and the bus can."""

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
"""A thread is worth its while from about this size on, and one that wakes late leaves its pieces to the others."""

_FEW_THREADS_COUNT: Final = 4
_MAX_THREADS_COUNT: Final = 8
_ABANDON_POLL_S: Final = 2e-4
"""A piece takes about as long."""

_MANY_THREADS_BYTES: Final = 128 << 20
"""One moves 7 to 14 GB/s, four 37, eight 48: that is the memory's own speed.

But a card that reads what was written just now reads it from the caches of those who wrote it: of four as fast as from
memory (50 GB/s), of eight at a third of that. Only of much more than caches hold is most in memory by then.
"""


def copy_into(target: _Array, source: _Array) -> None:
    """Copy `source` into `target`. See `copy_all`."""
    copy_all([(target, source)])


def copy_all(
    pairs: Sequence[tuple[_Array, _Array]], on_progress: Callable[[int], None] | None = None
) -> None:
    """Copy the second array of each pair into the first, of the same shape and, up to byte order, the same type.

    They must not overlap. numpy releases the interpreter's lock for each piece. Once an error of
    `on_progress` is raised, or an interrupt, nothing is copied any more.

    Args:
        on_progress: Told now and then how many bytes of the targets, one behind the other, are there
            from the first's begin on: ever more of them, and all at the end. It may be called in
            any thread, by one at a time; the others go on copying meanwhile.
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
    """Return how many threads are to share a copy that is not small."""
    most_count = _FEW_THREADS_COUNT if total_bytes < _MANY_THREADS_BYTES else _MAX_THREADS_COUNT
    return min(processors_count(), most_count)


def _split_pairs(
    pairs: Sequence[tuple[_Array, _Array]], on_progress: Callable[[int], None] | None
) -> Iterator[_PiecewiseCopy]:
    if on_progress is None:
        for target, source in pairs:
            yield _PiecewiseCopy(target, source)
        return
    front = _TotalProgress(on_progress, [target.nbytes for target, _ in pairs])
    for number, (target, source) in enumerate(pairs):
        yield _PiecewiseCopy(target, source, partial(front.note, number))


class _PiecewiseCopy:
    """Two arrays, and the pieces of one axis in which one is copied into the other.

    Args:
        note: Told how many bytes of the target, from its begin, are there.

    Attributes:
        begins: Where pieces begin along the axis.
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
        """Copy the piece that begins there."""
        piece = (*self._leading_slices, slice(begin, begin + self._length))
        np.copyto(self._target[piece], self._source[piece])
        if self._progress is not None:
            self._progress.add(begin)


class _CopyJob:
    """Pieces of arrays that are copied by whoever has time.

    Attributes:
        pieces_count: How many there are.
    """

    def __init__(self, all_pieces: Sequence[_PiecewiseCopy]) -> None:
        self._all_pieces = [(pieces, begin) for pieces in all_pieces for begin in pieces.begins]
        self.pieces_count = len(self._all_pieces)
        # one thread alone gets each of their numbers, whichever threads ask
        self._unclaimed_numbers = iter(range(self.pieces_count))
        self._remaining_counts = iter(range(self.pieces_count, 0, -1))
        self._active_threads: set[int] = set()  # threads that may be copying
        self._done_lock = threading.Lock()
        self._done_lock.acquire()
        self._errors: list[BaseException] = []

    def run_pieces(self) -> None:
        """Copy pieces until none is left that nobody has begun."""
        self._active_threads.add(threading.get_ident())
        for number in self._unclaimed_numbers:
            try:
                self._copy_piece(number)
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's
                self._errors.append(error)
                self._skip_rest()
            self._end_piece()
        self._active_threads.discard(threading.get_ident())

    def finish(self) -> None:
        """Copy pieces, and return once all are copied. Raises the first error of any thread: it ends the copy."""
        self.run_pieces()
        self._done_lock.acquire()
        # a thread that wakes late holds this for a while yet, and must not hold the caller's arrays
        self._all_pieces.clear()
        if self._errors:
            first, *_ = self._errors
            self._errors.clear()  # an error holds this frame, which must hold no error
            try:
                raise first
            finally:
                del first

    def abandon(self) -> None:
        """Have no more pieces copied, and return once no thread but this one copies any."""
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
    """How far copies of several arrays are, one behind the other.

    Args:
        tell: See `copy_all`.
        sizes_bytes: Of the arrays.
    """

    def __init__(self, tell: Callable[[int], None], sizes_bytes: Sequence[int]) -> None:
        self._report = tell
        self._sizes_bytes = sizes_bytes
        self._done_bytes = [0] * len(sizes_bytes)
        self._lock = threading.Lock()
        self._reported_bytes = 0
        self._is_reporting = False

    def note(self, number: int, done_bytes: int) -> None:
        """Note that so many bytes of an array, from its begin, are there."""
        with self._lock:
            self._done_bytes[number] = max(done_bytes, self._done_bytes[number])
            if self._is_reporting:
                return  # whoever tells will tell this too
            self._is_reporting = True
        self._report_new()

    def _report_new(self) -> None:
        """Tell how far the copies are, until there is nothing new."""
        while True:
            with self._lock:
                front_bytes = self._contiguous_bytes()
                if front_bytes == self._reported_bytes:
                    self._is_reporting = False
                    return
                self._reported_bytes = front_bytes
            self._report(front_bytes)

    def _contiguous_bytes(self) -> int:
        front_bytes = 0
        for size_bytes, done_bytes in zip(self._sizes_bytes, self._done_bytes, strict=True):
            front_bytes += done_bytes
            if done_bytes < size_bytes:
                break
        return front_bytes


class _PieceProgress:
    """How far a copy is, whose pieces are copied in any order.

    Args:
        tell: Told so, in bytes of the target from its begin: now and then of less than before.
        axis: Of the pieces.
        length: Of a piece along the axis.
    """

    def __init__(self, tell: Callable[[int], None], target: _Array, axis: int, length: int) -> None:
        self._report = tell
        self._is_in_order = target.flags.c_contiguous and axis == 0
        self._row_bytes = target.nbytes // target.shape[axis]
        self._extent, self._length = target.shape[axis], length
        self._lock = threading.Lock()
        self._contiguous_end = 0  # of the pieces in front, without a gap
        self._out_of_order_begins: set[int] = set()  # begins of the pieces behind a gap

    def add(self, begin: int) -> None:
        """Note that a piece was copied."""
        with self._lock:
            self._out_of_order_begins.add(begin)
            if begin != self._contiguous_end:
                return
            while self._contiguous_end in self._out_of_order_begins:
                self._out_of_order_begins.remove(self._contiguous_end)
                self._contiguous_end = min(self._contiguous_end + self._length, self._extent)
            end = self._contiguous_end
        if self._is_in_order or end == self._extent:
            self._report(end * self._row_bytes)


class _CopyThreads:
    """Threads that help to copy, started at the first need, and anew in a child process."""

    def __init__(self) -> None:
        register_fork_reset(self)
        self._lock = new_lock()
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Have no threads yet, as in a forked child."""
        self._count = 0
        self._queue: SimpleQueue[_CopyJob] = SimpleQueue()

    def help(self, copy: _CopyJob, count: int) -> None:
        """Have so many of them help as soon as they can. They do not keep the process alive."""
        for _ in range(min(count, self._start_threads(count))):
            self._queue.put(copy)

    def _start_threads(self, count: int) -> int:
        """Start threads until there are so many; return how many there are."""
        with self._lock, suppress(RuntimeError):  # if the system has no more, fewer help
            while self._count < count:
                name = f"copy {self._count}"
                threading.Thread(
                    target=_run_copy_thread, args=(self._queue,), name=name, daemon=True
                ).start()
                self._count += 1
        return self._count


def _run_copy_thread(waiting: SimpleQueue[_CopyJob]) -> None:
    while True:
        waiting.get().run_pieces()  # without a name, which would keep the arrays until the next


_copy_threads = _CopyThreads()

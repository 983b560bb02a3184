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

from deconvd.forks import begin_anew_in_children, new_lock
from deconvd.system import processors_count

__all__ = ["copy_all", "copy_into"]

_Array: TypeAlias = npt.NDArray[Any]

_PIECE_BYTES: Final = 2 << 20
"""A thread is worth its while from about this size on, and one that wakes late leaves its pieces to the others."""

_FEW_THREADS_COUNT: Final = 4
_MAX_THREADS_COUNT: Final = 8
_ABANDON_POLL_S: Final = 2e-4
"""A piece takes about as long."""

_MUCH_BYTES: Final = 128 << 20
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
    total_bytes = sum(target.nbytes for target, _ in pairs)
    is_small = total_bytes < 2 * _PIECE_BYTES
    threads_count = 1 if is_small else _threads_count(total_bytes)
    if is_small or (threads_count < 2 and on_progress is None):
        for target, source in pairs:
            np.copyto(target, source)
        if on_progress is not None:
            on_progress(total_bytes)
        return
    copy = _Copy([*_pieces([pair for pair in pairs if pair[0].nbytes], on_progress)])
    try:
        _helpers.help(copy, min(copy.pieces_count, threads_count) - 1)
        copy.finish()
    except BaseException:
        copy.abandon()
        raise


def _threads_count(total_bytes: int) -> int:
    """Return how many threads are to share a copy that is not small."""
    most_count = _FEW_THREADS_COUNT if total_bytes < _MUCH_BYTES else _MAX_THREADS_COUNT
    return min(processors_count(), most_count)


def _pieces(
    pairs: Sequence[tuple[_Array, _Array]], on_progress: Callable[[int], None] | None
) -> Iterator[_Pieces]:
    if on_progress is None:
        for target, source in pairs:
            yield _Pieces(target, source)
        return
    front = _Front(on_progress, [target.nbytes for target, _ in pairs])
    for number, (target, source) in enumerate(pairs):
        yield _Pieces(target, source, partial(front.note, number))


class _Pieces:
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
        self._before = (slice(None),) * axis
        self._length = max(-(-extent // max(target.nbytes // _PIECE_BYTES, 1)), 1)
        self.begins = range(0, extent, self._length)
        self._progress = note and _Progress(note, target, axis, self._length)

    def copy(self, begin: int) -> None:
        """Copy the piece that begins there."""
        piece = (*self._before, slice(begin, begin + self._length))
        np.copyto(self._target[piece], self._source[piece])
        if self._progress is not None:
            self._progress.add(begin)


class _Copy:
    """Pieces of arrays that are copied by whoever has time.

    Attributes:
        pieces_count: How many there are.
    """

    def __init__(self, all_pieces: Sequence[_Pieces]) -> None:
        self._all = [(pieces, begin) for pieces in all_pieces for begin in pieces.begins]
        self.pieces_count = len(self._all)
        # one thread alone gets each of their numbers, whichever threads ask
        self._numbers = iter(range(self.pieces_count))
        self._ends = iter(range(self.pieces_count, 0, -1))
        self._helping: set[int] = set()  # threads that may be copying
        self._is_done = threading.Lock()
        self._is_done.acquire()
        self._errors: list[BaseException] = []

    def help(self) -> None:
        """Copy pieces until none is left that nobody has begun."""
        self._helping.add(threading.get_ident())
        for number in self._numbers:
            try:
                self._copy_piece(number)
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's
                self._errors.append(error)
                self._skip_rest()
            self._end_piece()
        self._helping.discard(threading.get_ident())

    def finish(self) -> None:
        """Copy pieces, and return once all are copied. Raises the first error of any thread: it ends the copy."""
        self.help()
        self._is_done.acquire()
        # a thread that wakes late holds this for a while yet, and must not hold the caller's arrays
        self._all.clear()
        if self._errors:
            first, *_ = self._errors
            self._errors.clear()  # an error holds this frame, which must hold no error
            try:
                raise first
            finally:
                del first

    def abandon(self) -> None:
        """Have no more pieces copied, and return once no thread but this one copies any."""
        for _ in self._numbers:
            pass
        while self._helping - {threading.get_ident()}:
            time.sleep(_ABANDON_POLL_S)
        self._all.clear()

    def _copy_piece(self, number: int) -> None:
        pieces, begin = self._all[number]
        pieces.copy(begin)

    def _skip_rest(self) -> None:
        for _ in self._numbers:
            self._end_piece()

    def _end_piece(self) -> None:
        if next(self._ends) == 1:
            self._is_done.release()


class _Front:
    """How far copies of several arrays are, one behind the other.

    Args:
        tell: See `copy_all`.
        sizes_bytes: Of the arrays.
    """

    def __init__(self, tell: Callable[[int], None], sizes_bytes: Sequence[int]) -> None:
        self._tell = tell
        self._sizes_bytes = sizes_bytes
        self._done_bytes = [0] * len(sizes_bytes)
        self._lock = threading.Lock()
        self._told_bytes = 0
        self._is_telling = False

    def note(self, number: int, done_bytes: int) -> None:
        """Note that so many bytes of an array, from its begin, are there."""
        with self._lock:
            self._done_bytes[number] = max(done_bytes, self._done_bytes[number])
            if self._is_telling:
                return  # whoever tells will tell this too
            self._is_telling = True
        self._tell_all()

    def _tell_all(self) -> None:
        """Tell how far the copies are, until there is nothing new."""
        while True:
            with self._lock:
                front_bytes = self._front_bytes()
                if front_bytes == self._told_bytes:
                    self._is_telling = False
                    return
                self._told_bytes = front_bytes
            self._tell(front_bytes)

    def _front_bytes(self) -> int:
        front_bytes = 0
        for size_bytes, done_bytes in zip(self._sizes_bytes, self._done_bytes, strict=True):
            front_bytes += done_bytes
            if done_bytes < size_bytes:
                break
        return front_bytes


class _Progress:
    """How far a copy is, whose pieces are copied in any order.

    Args:
        tell: Told so, in bytes of the target from its begin: now and then of less than before.
        axis: Of the pieces.
        length: Of a piece along the axis.
    """

    def __init__(self, tell: Callable[[int], None], target: _Array, axis: int, length: int) -> None:
        self._tell = tell
        self._is_in_order = target.flags.c_contiguous and axis == 0
        self._row_bytes = target.nbytes // target.shape[axis]
        self._extent, self._length = target.shape[axis], length
        self._lock = threading.Lock()
        self._end = 0  # of the pieces in front, without a gap
        self._ahead: set[int] = set()  # begins of the pieces behind a gap

    def add(self, begin: int) -> None:
        """Note that a piece was copied."""
        with self._lock:
            self._ahead.add(begin)
            if begin != self._end:
                return
            while self._end in self._ahead:
                self._ahead.remove(self._end)
                self._end = min(self._end + self._length, self._extent)
            end = self._end
        if self._is_in_order or end == self._extent:
            self._tell(end * self._row_bytes)


class _Helpers:
    """Threads that help to copy, started at the first need, and anew in a child process."""

    def __init__(self) -> None:
        begin_anew_in_children(self)
        self._lock = new_lock()
        self.begin_anew_in_child()

    def begin_anew_in_child(self) -> None:
        """Have no threads yet, as in a forked child."""
        self._count = 0
        self._waiting: SimpleQueue[_Copy] = SimpleQueue()

    def help(self, copy: _Copy, count: int) -> None:
        """Have so many of them help as soon as they can. They do not keep the process alive."""
        for _ in range(min(count, self._started(count))):
            self._waiting.put(copy)

    def _started(self, count: int) -> int:
        """Start threads until there are so many; return how many there are."""
        with self._lock, suppress(RuntimeError):  # if the system has no more, fewer help
            while self._count < count:
                name = f"copy {self._count}"
                threading.Thread(
                    target=_serve, args=(self._waiting,), name=name, daemon=True
                ).start()
                self._count += 1
        return self._count


def _serve(waiting: SimpleQueue[_Copy]) -> None:
    while True:
        waiting.get().help()  # without a name, which would keep the arrays until the next


_helpers = _Helpers()

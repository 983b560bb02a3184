"""Large calls in parts of their samples: while one part is computed, the next comes and the last one goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from deconvd.problem import Problem
from deconvd.tensor import Array
from deconvd_server.call import Call
from deconvd_server.device.cuda.host_memory import HostMemory, HostPlaces
from deconvd_server.device.cuda.kind import Kind, addresses
from deconvd_server.device.cuda.marks import Marks
from deconvd_server.device.cuda.memory import DeviceMemory, Regions
from deconvd_server.device.cuda.plan import OPERAND_ALIGNMENT_BYTES
from deconvd_server.device.cuda.runtime import Bytes, Stream, copy, download, upload
from deconvd_server.device.cuda.staging import Staging, bytes_of
from deconvd_server.device.protocol import Operand
from deconvd_server.ledger import Stage
from deconvd_server.writing import Writing

__all__ = ["Pipeline", "count_parts"]

_PART_BYTES = 4 << 20
_MAX_PARTS_COUNT = 8
"""Parts of x and y that take the card no less to copy than the host takes to enqueue them."""

_SMALL_PART_BYTES = 2 << 20
_SMALL_PARTS_COUNT = 4
"""What is too little for so many such parts is divided into smaller ones: a graph of few is launched soon."""

_MIRRORED_BYTES = 1 << 20
"""What the calling thread copies in the time that it takes to have others do it."""

_SMALL_BYTES = 16 << 10
"""What is sooner copied than looked up."""

_FOLLOWED_BYTES = 2 << 20
"""In pieces of this size an operand that is used whole is uploaded while it is written."""

_REMEMBERED_COUNT = 1024


class _Reached(NamedTuple):
    """An operand where the card reaches it: on the card, in lent memory, or as a copy in pinned memory.

    Attributes:
        lent: Itself, if that is in lent memory; else None.
    """

    operand: Operand
    lent: Array | None = None


@lru_cache(_REMEMBERED_COUNT)
def count_parts(problem: Problem) -> int:
    """Return in how many parts of its samples y is to be computed where the card reaches x and y.

    Each has as many samples, and begins where plans want their operands.
    """
    x_bytes, y_bytes = problem.x.nbytes, problem.y.nbytes
    few = min((x_bytes + y_bytes) // _SMALL_PART_BYTES, _SMALL_PARTS_COUNT)
    most = min(max((x_bytes + y_bytes) // _PART_BYTES, few), _MAX_PARTS_COUNT)
    for count in range(most, 1, -1):
        part_bytes = x_bytes // count | y_bytes // count
        if problem.n % count == 0 and part_bytes % OPERAND_ALIGNMENT_BYTES == 0:
            return count
    return 1


class Pipeline:
    """Computes y where the card reaches x and y by itself: one stream for each way, one for the work.

    Args:
        stream: For the work.
        memory: Where blocks come from.
        staging: Copies operands that are not divided, on the stream for the work.
        host_memory: What the card reaches.
        pinned: Memory for copies of small operands that it does not.
    """

    def __init__(
        self,
        stream: Stream,
        memory: DeviceMemory,
        staging: Staging,
        host_memory: HostMemory,
        pinned: Bytes,
    ) -> None:
        self._up, self._work, self._down = Stream(), stream, Stream()
        self._memory = memory
        self._staging = staging
        self._host_memory = host_memory
        self._pinned = pinned
        self._marks = Marks(stream)

    def run(
        self, kind: Kind, operands: Sequence[Operand], y: Array, places: HostPlaces, call: Call
    ) -> None:
        """Compute y.

        The bus is what takes longest, so it is to begin soon and never to wait for the host: once
        such a call has come before, all of it is enqueued as one graph. Operands that are still being
        written are followed piece by piece.

        Args:
            kind: Of the call, with as many parts as `count_parts` returns.
            operands: x, then those that are not divided.
            places: Of x and y.

        Raises as `Lane.run` does, and LateError.
        """
        x, *others = operands
        assert isinstance(x, np.ndarray)
        writing = call.writing
        if writing is not None and writing.has(x.nbytes):
            writing = None
        with self._memory.take(kind.frame.total_bytes) as base:
            call.check()
            if writing is not None and not self._can_follow(others, writing):
                writing.expect(0, x.nbytes)
            reached = self._reached(others)
            try:
                if reached is None:
                    if writing is not None:
                        writing.expect(0, x.nbytes)
                    self._enqueue(kind, base, operands, y, self._staged(call), writing)
                else:
                    self._launch(kind, base, x, reached, y, places, writing)
                self._up.wait()  # what the others do has come together in it
            except BaseException:
                for stream in (self._up, self._work, self._down):
                    stream.wait()
                raise
            self._marks.account(call.ledger)
            if call.writing is not None:  # though it may have written all before it was looked at
                call.ledger.add(Stage.FOLLOW, call.writing.waited_s)

    def _launch(
        self,
        kind: Kind,
        base: int,
        x: Array,
        others: Sequence[_Reached],
        y: Array,
        places: HostPlaces,
        writing: Writing | None,
    ) -> None:
        """Enqueue a call whose arrays the card all reaches, as a graph if that can be."""

        def enqueue() -> None:
            operands = [x, *(other.operand for other in others)]
            upload_whole = self._upload if writing is None else self._followed(writing, x.nbytes)
            self._enqueue(kind, base, operands, y, upload_whole, writing)

        lent = [other.lent for other in others if other.lent is not None]
        if lent:
            places = places.beside(lent)
        if writing is None and places.are_apart:
            # copies lie at the same places again, where it is the same operands that are copied
            at = base, *(other.lent is None for other in others)
            kind.launch(self._up, enqueue, at, places)
        else:
            enqueue()

    def _enqueue(
        self,
        kind: Kind,
        base: int,
        operands: Sequence[Operand],
        y: Array,
        upload_whole: Callable[[Array, int], None],
        writing: Writing | None,
    ) -> None:
        """Enqueue a call, between a beginning and an end on the stream for the way up.

        Args:
            base: Address of a block for the kind's frame.
            upload_whole: Enqueues a copy of an operand that is not divided, on the stream for the way up or for
                the work.
            writing: How far operands are written; None if they are there.

        Raises:
            LateError: They are not written in time.
        """
        up, work, down, in_graph = self._up, self._work, self._down, self._up.is_capturing
        x, *others = operands
        assert isinstance(x, np.ndarray)
        x_at, *used_at = addresses(base, kind.frame.operands, kind.operands_at)
        (y_at,) = addresses(base, kind.frame.results, kind.results_at)
        workspace = base + kind.frame.workspace.offset
        self._marks.begin(up, in_graph=in_graph)
        for other, lies_at, target in zip(others, kind.operands_at[1:], used_at, strict=True):
            if isinstance(other, np.ndarray):
                upload_whole(other, target)
            elif lies_at is not None and lies_at != target:
                copy(target, lies_at, other.spec.nbytes, up.pointer)
        written_bytes = 0
        for x_part, y_part in zip(
            _parts(x, kind.parts_count), _parts(y, kind.parts_count), strict=True
        ):
            if writing is not None:
                written_bytes += x_part.nbytes
                writing.expect(written_bytes, x.nbytes)
            upload(x_at, x_part, up.pointer)
            up.fork(work)
            self._compute(kind, [x_at, *used_at], y_at, workspace, is_alone=writing is not None)
            work.fork(down)
            download(y_part, y_at, down.pointer)
            x_at, y_at = x_at + x_part.nbytes, y_at + y_part.nbytes
        self._marks.end(Stage.UPLOAD, up, in_graph=in_graph)
        self._marks.end(Stage.COMPUTE, work, in_graph=in_graph)
        self._marks.end(Stage.DOWNLOAD, down, in_graph=in_graph)
        for stream in (work, down):  # a graph must end in one stream
            stream.fork(up)

    def _compute(
        self, kind: Kind, operands: Sequence[int], y: int, workspace: int, *, is_alone: bool
    ) -> None:
        """Enqueue the work of a part.

        Args:
            is_alone: Whether it is to be a graph of its own: so that the host keeps up with who writes x.
        """

        def enqueue() -> None:
            kind.job.enqueue(operands, [y], workspace, self._work.pointer)

        if is_alone:
            kind.launch(self._work, enqueue, (workspace, *operands, y))
        else:
            enqueue()

    def _reached(self, others: Sequence[Operand]) -> list[_Reached] | None:
        """Return operands as the card reaches them. None if one that it does not reach is large."""
        reached: list[_Reached] = []
        mirrors = Regions()
        for other in others:
            if not isinstance(other, np.ndarray):
                reached.append(_Reached(other))
            elif self._is_lent(other):
                reached.append(_Reached(other, lent=other))
            else:
                region = mirrors.add(other.nbytes)
                if mirrors.total_bytes > _MIRRORED_BYTES:
                    return None
                dtype = other.dtype.newbyteorder("=")
                mirror = np.ndarray(other.shape, dtype, self._pinned, region.offset)
                mirror[...] = other
                reached.append(_Reached(mirror))
        return reached

    def _is_lent(self, array: Array) -> bool:
        """Return whether the card is to copy an array from where it lies."""
        return array.nbytes > _SMALL_BYTES and self._host_memory.holds(array)

    def _upload(self, array: Array, target: int) -> None:
        upload(target, bytes_of(array), self._up.pointer)

    def _can_follow(self, others: Sequence[Operand], writing: Writing) -> bool:
        """Return whether what is written before x is just what the card is to copy from where it lies."""
        arrays = (other for other in others if isinstance(other, np.ndarray))
        lent_bytes = sum(array.nbytes for array in arrays if self._is_lent(array))
        return lent_bytes == writing.before_bytes

    def _followed(self, writing: Writing, x_bytes: int) -> Callable[[Array, int], None]:
        """Return what uploads operands while they are written, one behind the other."""
        written_bytes = 0

        def upload_followed(array: Array, target: int) -> None:
            nonlocal written_bytes
            if not self._is_lent(array):
                self._upload(array, target)
                return
            whole = bytes_of(array)
            for begin in range(0, whole.size, _FOLLOWED_BYTES):
                piece = whole[begin : begin + _FOLLOWED_BYTES]
                written_bytes += piece.size
                writing.expect_before(written_bytes, x_bytes)
                upload(target + begin, piece, self._up.pointer)

        return upload_followed

    def _staged(self, call: Call) -> Callable[[Array, int], None]:
        return lambda array, target: self._staging.upload(array, target, call.check)


def _parts(array: Array, count: int) -> list[Bytes]:
    """Return the bytes of equal parts of an array's samples."""
    whole = bytes_of(array)
    step = whole.size // count
    return [whole[begin : begin + step] for begin in range(0, whole.size, step)]

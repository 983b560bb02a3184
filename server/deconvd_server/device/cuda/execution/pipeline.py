"""Large calls in parts or steps: while one is computed, what the next needs comes, and what the last has made goes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.problem import Problem
from deconvd_server.call.context import CallContext
from deconvd_server.call.ledger import Stage
from deconvd_server.device.arriving import Arriving, Operand, OverlappedOperands, peek_tensor
from deconvd_server.device.cuda.api.host_memory import HostAddresses, RegisteredMemory
from deconvd_server.device.cuda.api.memory import BlockLayout, DeviceMemory
from deconvd_server.device.cuda.api.runtime import Bytes, Stream, copy, download, upload
from deconvd_server.device.cuda.execution.call_kind import CallKind, tensor_addresses
from deconvd_server.device.cuda.execution.stage_timer import StageTimer
from deconvd_server.device.cuda.execution.staging import Staging, bytes_of
from deconvd_server.device.cuda.plan import OPERAND_ALIGNMENT_BYTES
from deconvd_server.device.tensor import Tensor

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

_OVERLAP_PIECE_BYTES = 2 << 20
"""In pieces of this size an operand that is used whole is uploaded while it arrives."""

_LRU_ENTRIES_COUNT = 1024


class _ReachableTensor(NamedTuple):
    """A tensor where the card reaches it: on the card, in lent memory, or as a mirror in pinned memory.

    Attributes:
        lent: Its array, if that is in lent memory; else None.
    """

    operand: Operand
    lent: Array | None = None


@lru_cache(_LRU_ENTRIES_COUNT)
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
    """Computes where the card reaches a call's arrays by itself: one stream for each way, one for the work.

    The bus is what takes longest, so it is to begin soon and never to wait for the host: once such a
    call has come before, all of it is enqueued as one graph.

    Args:
        stream: For the work.
        memory: Where blocks come from.
        staging: Copies operands that are not divided, on the stream for the work.
        host_memory: What the card reaches.
        pinned: Memory for copies of small arrays that it does not.
    """

    def __init__(
        self,
        stream: Stream,
        memory: DeviceMemory,
        staging: Staging,
        host_memory: RegisteredMemory,
        pinned: Bytes,
    ) -> None:
        self._upload_stream, self._compute_stream, self._download_stream = (
            Stream(),
            stream,
            Stream(),
        )
        self._memory = memory
        self._staging = staging
        self._host_memory = host_memory
        self._pinned = pinned
        self._timer = StageTimer(stream)

    def run(
        self,
        kind: CallKind,
        operands: Sequence[Operand],
        y: Array,
        places: HostAddresses,
        call: CallContext,
    ) -> None:
        """Compute y in parts.

        Operands that are still arriving are followed piece by piece.

        Args:
            kind: Of the call, with as many parts as `count_parts` returns.
            operands: x, then those that are not divided.
            places: Of x and y.

        Raises as `Lane.run` does, and ArrivalTimeoutError.
        """
        following = OverlappedOperands(operands)
        x, *others = following.operands

        def enqueue(base: int) -> None:
            reached = self._make_reachable(others, BlockLayout(), following)
            if reached is not None:
                self._launch_parts(kind, base, x, reached, y, places, following)
                return
            upload_whole = self._make_staged_upload(call)
            self._enqueue_parts(kind, base, [x, *others], y, upload_whole, following)

        self._run(kind, call, enqueue, following)

    def run_steps(
        self,
        kind: CallKind,
        operands: Sequence[Operand],
        results: Sequence[Tensor],
        call: CallContext,
    ) -> bool:
        """Compute the results of a job in its steps; return False if they are to be computed in another way.

        That is if the card does not reach all large arrays. Raises as `run` does.

        Args:
            kind: Of the call, in one part.
            operands, results: In the job's order.
        """
        following = OverlappedOperands(operands)
        generation, mirrors = self._host_memory.generation, BlockLayout()
        targets = self._make_reachable(results, mirrors, None)
        sources = (
            None
            if targets is None
            else self._make_reachable(following.operands, mirrors, following)
        )
        if targets is None or sources is None:
            return False
        made = [peek_tensor(target.operand) for target in targets]
        tensors = [*sources, *targets]
        places = HostAddresses.of(generation, [t.lent for t in tensors if t.lent is not None])

        def enqueue_steps(base: int) -> None:
            given = [source.operand for source in sources]
            self._enqueue_steps(kind, base, given, made, following)

        def enqueue(base: int) -> None:
            if not following.are_complete:
                enqueue_steps(base)
                return
            at = base, *(tensor.lent is None for tensor in tensors)
            self._launch(kind, partial(enqueue_steps, base), at, places)

        self._run(kind, call, enqueue, following)
        for result, target in zip(results, made, strict=True):
            if isinstance(result, np.ndarray) and target is not result:
                result[...] = target
        return True

    def _run(
        self,
        kind: CallKind,
        call: CallContext,
        enqueue: Callable[[int], None],
        following: OverlappedOperands,
    ) -> None:
        """Have a call enqueued, given the address of a block for the kind's frame, and wait for it."""
        with self._memory.lease(kind.layout.total_bytes) as base:
            call.check()
            try:
                enqueue(base)
                self._upload_stream.wait()  # what the others do has come together in it
            except BaseException:
                for stream in (self._upload_stream, self._compute_stream, self._download_stream):
                    stream.wait()
                raise
            self._timer.record_stages(call.ledger)
            if following.is_overlapped:  # though all may have been there before it was looked at
                call.ledger.add(Stage.OVERLAP, following.waited_s)

    def _launch_parts(
        self,
        kind: CallKind,
        base: int,
        x: Operand,
        others: Sequence[_ReachableTensor],
        y: Array,
        places: HostAddresses,
        following: OverlappedOperands,
    ) -> None:
        """Enqueue a call in parts whose arrays the card all reaches."""

        def enqueue() -> None:
            operands = [x, *(other.operand for other in others)]
            self._enqueue_parts(kind, base, operands, y, self._upload, following)

        if not following.are_complete:
            enqueue()
            return
        lent = [other.lent for other in others if other.lent is not None]
        if lent:
            places = places.with_arrays(lent)
        self._launch(kind, enqueue, (base, *(other.lent is None for other in others)), places)

    def _launch(
        self, kind: CallKind, enqueue: Callable[[], None], at: Hashable, places: HostAddresses
    ) -> None:
        """Enqueue a call, as a graph if that can be.

        Args:
            at: The block, and which arrays are mirrored: mirrors lie at the same places again, where it is the
                same arrays that have some.
            places: Of the other arrays.
        """
        if places.are_disjoint:
            kind.launch(self._upload_stream, enqueue, at, places)
        else:
            enqueue()

    def _enqueue_parts(
        self,
        kind: CallKind,
        base: int,
        operands: Sequence[Operand],
        y: Array,
        upload_whole: Callable[[Array, int], None],
        following: OverlappedOperands,
    ) -> None:
        """Enqueue a call in parts, between a beginning and an end on the stream for the way up.

        Args:
            base: Address of a block for the kind's frame.
            upload_whole: Enqueues a copy of an operand that is not divided, on the stream for the way up or for
                the work.
            following: Waits for operands that are still arriving.

        Raises:
            ArrivalTimeoutError: They do not arrive in time.
        """
        up, work, down = self._upload_stream, self._compute_stream, self._download_stream
        x, *others = operands
        source = peek_tensor(x)
        assert isinstance(source, np.ndarray)
        x_at, *used_at = tensor_addresses(base, kind.layout.operands, kind.operand_addresses)
        (y_at,) = tensor_addresses(base, kind.layout.results, kind.result_addresses)
        workspace = base + kind.layout.workspace.offset
        self._begin()
        for other, lies_at, target in zip(others, kind.operand_addresses[1:], used_at, strict=True):
            self._place_operand(other, lies_at, target, upload_whole, following)
        end_bytes = 0
        for x_part, y_part in zip(
            _parts(source, kind.parts_count), _parts(y, kind.parts_count), strict=True
        ):
            if isinstance(x, Arriving):
                end_bytes += x_part.nbytes
                following.wait_for(x, end_bytes)
            upload(x_at, x_part, up.pointer)
            up.fork(work)
            self._compute(
                kind, [x_at, *used_at], y_at, workspace, is_alone=not following.are_complete
            )
            work.fork(down)
            download(y_part, y_at, down.pointer)
            x_at, y_at = x_at + x_part.nbytes, y_at + y_part.nbytes
        self._end()

    def _enqueue_steps(
        self,
        kind: CallKind,
        base: int,
        operands: Sequence[Operand],
        results: Sequence[Tensor],
        following: OverlappedOperands,
    ) -> None:
        """Enqueue a call in steps, in the manner of `_enqueue_parts`."""
        up, work, down = self._upload_stream, self._compute_stream, self._download_stream
        operands_at = tensor_addresses(base, kind.layout.operands, kind.operand_addresses)
        results_at = tensor_addresses(base, kind.layout.results, kind.result_addresses)
        workspace = base + kind.layout.workspace.offset
        is_there = [False] * len(operands)
        self._begin()
        for step in kind.work.steps:
            for number in step.operands:
                if not is_there[number]:
                    lies_at, target = kind.operand_addresses[number], operands_at[number]
                    self._place_operand(operands[number], lies_at, target, self._upload, following)
                    is_there[number] = True
            up.fork(work)
            step.enqueue(operands_at, results_at, workspace, work.pointer)
            work.fork(down)
            for number in step.results:
                result, made_at = results[number], results_at[number]
                lies_at = kind.result_addresses[number]
                if isinstance(result, np.ndarray):
                    download(bytes_of(result), made_at, down.pointer)
                elif lies_at is not None and lies_at != made_at:
                    copy(lies_at, made_at, result.spec.nbytes, down.pointer)
        self._end()

    def _begin(self) -> None:
        self._timer.begin(self._upload_stream, in_graph=self._upload_stream.is_capturing)

    def _end(self) -> None:
        """Mark the ends of the stages, and have them come together in the stream for the way up."""
        in_graph = self._upload_stream.is_capturing
        self._timer.end(Stage.UPLOAD, self._upload_stream, in_graph=in_graph)
        self._timer.end(Stage.COMPUTE, self._compute_stream, in_graph=in_graph)
        self._timer.end(Stage.DOWNLOAD, self._download_stream, in_graph=in_graph)
        for stream in (
            self._compute_stream,
            self._download_stream,
        ):  # a graph must end in one stream
            stream.fork(self._upload_stream)

    def _place_operand(
        self,
        operand: Operand,
        lies_at: int | None,
        target: int,
        upload_array: Callable[[Array, int], None],
        following: OverlappedOperands,
    ) -> None:
        """Enqueue a copy of an operand to where it is used, unless it is there."""
        if isinstance(operand, Arriving):
            self._upload_overlapped(operand, target, upload_array, following)
        elif isinstance(operand, np.ndarray):
            upload_array(operand, target)
        elif lies_at is not None and lies_at != target:
            copy(target, lies_at, operand.spec.nbytes, self._upload_stream.pointer)

    def _compute(
        self, kind: CallKind, operands: Sequence[int], y: int, workspace: int, *, is_alone: bool
    ) -> None:
        """Enqueue the work of a part.

        Args:
            is_alone: Whether it is to be a graph of its own: so that the host keeps up with x as it arrives.
        """

        def enqueue() -> None:
            kind.work.enqueue(operands, [y], workspace, self._compute_stream.pointer)

        if is_alone:
            kind.launch(self._compute_stream, enqueue, (workspace, *operands, y))
        else:
            enqueue()

    def _make_reachable(
        self,
        operands: Sequence[Operand],
        mirrors: BlockLayout,
        following: OverlappedOperands | None,
    ) -> list[_ReachableTensor] | None:
        """Return operands or places as the card reaches them. None if one that it does not reach is large.

        Args:
            mirrors: Those of the call so far.
            following: Waits for operands that are mirrored; None for places.
        """
        reached: list[_ReachableTensor] = []
        for operand in operands:
            array = peek_tensor(operand)
            if not isinstance(array, np.ndarray):
                reached.append(_ReachableTensor(operand))
            elif self._is_lent(array):
                reached.append(_ReachableTensor(operand, lent=array))
            else:
                region = mirrors.add(array.nbytes)
                if mirrors.total_bytes > _MIRRORED_BYTES:
                    return None
                dtype = array.dtype.newbyteorder("=")
                mirror = np.ndarray(array.shape, dtype, self._pinned, region.offset)
                if following is not None:
                    following.wait_for_all(operand)
                    mirror[...] = array
                reached.append(_ReachableTensor(mirror))
        return reached

    def _is_lent(self, array: Array) -> bool:
        """Return whether the card is to copy an array from where it lies."""
        return array.nbytes > _SMALL_BYTES and self._host_memory.holds(array)

    def _upload(self, array: Array, target: int) -> None:
        upload(target, bytes_of(array), self._upload_stream.pointer)

    def _upload_overlapped(
        self,
        operand: Arriving,
        target: int,
        upload_array: Callable[[Array, int], None],
        following: OverlappedOperands,
    ) -> None:
        """Enqueue copies of an operand, piece by piece as it arrives if the card reaches it."""
        if not self._is_lent(operand.array):
            following.wait_for_all(operand)
            upload_array(operand.array, target)
            return
        whole = bytes_of(operand.array)
        for begin in range(0, whole.size, _OVERLAP_PIECE_BYTES):
            piece = whole[begin : begin + _OVERLAP_PIECE_BYTES]
            following.wait_for(operand, begin + piece.size)
            upload(target + begin, piece, self._upload_stream.pointer)

    def _make_staged_upload(self, call: CallContext) -> Callable[[Array, int], None]:
        return lambda array, target: self._staging.upload(array, target, call.check)


def _parts(array: Array, count: int) -> list[Bytes]:
    """Return the bytes of equal parts of an array's samples."""
    whole = bytes_of(array)
    step = whole.size // count
    return [whole[begin : begin + step] for begin in range(0, whole.size, step)]

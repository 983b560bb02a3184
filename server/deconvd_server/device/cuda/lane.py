"""A lane of the card: one call at a time is uploaded, computed and downloaded, beside others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor

import numpy as np

from deconvd.dtypes import DType
from deconvd.tensor import Array
from deconvd_server.call import Call
from deconvd_server.device.cuda.cudnn import CudnnError
from deconvd_server.device.cuda.job import Job
from deconvd_server.device.cuda.marks import Marks
from deconvd_server.device.cuda.memory import DeviceMemory, Region
from deconvd_server.device.cuda.results import ResultMemory
from deconvd_server.device.cuda.runtime import (
    CudaError,
    Graph,
    PinnedBuffer,
    Stream,
    download,
    upload,
)
from deconvd_server.device.cuda.staging import Staging
from deconvd_server.ledger import Ledger, Stage

__all__ = ["ARENA_BYTES", "PINNED_BYTES", "Lane"]

ARENA_BYTES = 8 << 20
"""What a small call's operands, results and workspace fit in: the memory that graphs are bound to."""

_SLOTS_COUNT = 8
_SLOT_BYTES = 4 << 20
"""Of the sizes that were measured, this keeps the card's bus busiest with large arrays."""

PINNED_BYTES = ARENA_BYTES + _SLOTS_COUNT * _SLOT_BYTES
"""Pinned host memory of a lane."""

_KINDS_COUNT = 64
"""Kinds of calls that a lane remembers: each may hold a graph."""

_WARM_RUNS = 1
"""Calls of a kind before it is captured: what comes once is not worth it."""


class _Kind:
    """Calls that do the same work on other numbers."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.runs_count = 0
        self.graph: Graph | None = None


class Lane:
    """A stream with its buffers. Serves one call at a time; its thread has the card as its device.

    A small call lies in an arena that is always at the same place, so all it does, copies included,
    is captured as a graph when its kind comes again. A large one takes a block of its own.

    Args:
        memory: Where blocks come from.
        arena: Address of ARENA_BYTES on the card.
        helpers: Who copies large arrays within the host.
        results: Where large results lie.
    """

    def __init__(
        self, memory: DeviceMemory, arena: int, helpers: Executor, results: ResultMemory
    ) -> None:
        self.stream = Stream()
        self._memory = memory
        self._arena = arena
        self._results = results
        self._pinned = PinnedBuffer(ARENA_BYTES).bytes
        self._staging = Staging(
            self.stream, helpers, slots_count=_SLOTS_COUNT, slot_bytes=_SLOT_BYTES
        )
        self._marks = Marks(self.stream)
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()

    def run(
        self,
        key: Hashable,
        prepare: Callable[[], Job],
        operands: Sequence[Array],
        call: Call,
    ) -> list[Array]:
        """Return the results of a call.

        Args:
            key: Of the kind of call.
            prepare: Returns the job of this kind of call, if the lane does not remember it.
            operands: In the order of the job's frame.
            call: Whose it is: asked between steps whether it is still wanted, and told the times.

        Raises:
            ExhaustedError: The card has not the memory now.
            CudaError, CudnnError: The card or cuDNN failed.
            CallCancelledError, DeadlineError: The call has ended.
        """
        kind = self._kind(key, prepare)
        call.check()
        if kind.job.frame.total_bytes <= ARENA_BYTES:
            return self._run_small(kind, operands, call.ledger)
        return self._run_large(kind.job, operands, call)

    def close(self) -> None:
        """Forget all kinds of calls and their graphs. No call may be under way."""
        self._kinds.clear()

    def _kind(self, key: Hashable, prepare: Callable[[], Job]) -> _Kind:
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind(prepare())
            if len(self._kinds) > _KINDS_COUNT:
                self._kinds.popitem(last=False)
        else:
            self._kinds.move_to_end(key)
        return kind

    def _run_small(self, kind: _Kind, operands: Sequence[Array], ledger: Ledger) -> list[Array]:
        frame = kind.job.frame
        with ledger.timing(Stage.UPLOAD):
            for region, operand in zip(frame.operands, operands, strict=True):
                self._view(region, operand.shape, operand.dtype)[...] = operand
        with ledger.timing(Stage.COMPUTE):  # and the card's own copies, which are part of the graph
            try:
                self._launch(kind)
            finally:
                self.stream.wait()
        with ledger.timing(Stage.DOWNLOAD):
            return [
                self._view(region, spec.shape, spec.dtype).copy()
                for region, spec in zip(frame.results, kind.job.results, strict=True)
            ]

    def _launch(self, kind: _Kind) -> None:
        kind.runs_count += 1
        if kind.runs_count == _WARM_RUNS + 1:
            kind.graph = self._captured(kind.job)
        if kind.graph is None:
            self._enqueue_small(kind.job)
        else:
            kind.graph.launch(self.stream.pointer)

    def _captured(self, job: Job) -> Graph | None:
        try:
            return self.stream.capture(lambda: self._enqueue_small(job))
        except (CudaError, CudnnError):
            return None  # some of cuDNN's engines do what no graph can hold

    def _enqueue_small(self, job: Job) -> None:
        stream, frame = self.stream.pointer, job.frame
        upload(self._arena, self._pinned[: frame.operands_bytes], stream)
        job.enqueue(self._arena, stream)
        end = frame.operands_bytes + frame.results_bytes
        results = self._pinned[frame.operands_bytes : end]
        download(results, self._arena + frame.operands_bytes, stream)

    def _run_large(self, job: Job, operands: Sequence[Array], call: Call) -> list[Array]:
        frame = job.frame
        with self._memory.take(frame.total_bytes) as base:
            try:
                self._marks.begin()
                for region, operand in zip(frame.operands, operands, strict=True):
                    self._staging.upload(operand, base + region.offset, call.check)
                call.check()
                self._marks.end(Stage.UPLOAD)
                job.enqueue(base, self.stream.pointer)
                self._marks.end(Stage.COMPUTE)
                results = [self._results.empty(spec) for spec in job.results]
                for region, result in zip(frame.results, results, strict=True):
                    self._staging.download(base + region.offset, result, call.check)
                self._marks.end(Stage.DOWNLOAD)
            finally:
                self.stream.wait()
            self._marks.account(call.ledger)
            return results

    def _view(self, region: Region, shape: tuple[int, ...], dtype: DType) -> Array:
        """Return the pinned memory that mirrors a region of the arena, as an array."""
        return np.ndarray(shape, dtype, self._pinned, region.offset)

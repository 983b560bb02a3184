"""A lane of the card: one call at a time is uploaded, computed and downloaded on it, beside other lanes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from deconvd.tensor import Array
from deconvd_server.device.cuda.cudnn import CudnnError
from deconvd_server.device.cuda.job import Job
from deconvd_server.device.cuda.memory import DeviceMemory
from deconvd_server.device.cuda.runtime import (
    Bytes,
    CudaError,
    Graph,
    PinnedBuffer,
    Stream,
    download,
    upload,
)
from deconvd_server.device.cuda.staging import Staging

__all__ = ["ARENA_BYTES", "PINNED_BYTES", "Lane"]

ARENA_BYTES = 8 << 20
"""What a small call's operands, results and workspace fit in: the memory that graphs are bound to."""

_SLOTS_COUNT = 4
_SLOT_BYTES = 4 << 20

PINNED_BYTES = ARENA_BYTES + _SLOTS_COUNT * _SLOT_BYTES
"""Pinned host memory of a lane."""

_GRAPHS_COUNT = 64
_WARM_RUNS = 1
"""Calls of a kind before one is captured: what comes once is not worth it."""


class Lane:
    """A stream with its buffers. Serves one call at a time; its thread has the card as its device.

    A small call lies in an arena that is always at the same place, so all it does, copies included,
    is captured as a graph when its kind comes again. A large one takes a block of its own.

    Args:
        memory: Where blocks come from, and the arena.
        arena: Address of ARENA_BYTES on the card.
    """

    def __init__(self, memory: DeviceMemory, arena: int) -> None:
        self.stream = Stream()
        self._memory = memory
        self._arena = arena
        self._pinned = PinnedBuffer(ARENA_BYTES).bytes
        self._staging = Staging(self.stream, slots_count=_SLOTS_COUNT, slot_bytes=_SLOT_BYTES)
        self._graphs = _Graphs()

    def run(self, job: Job, operands: Sequence[Array], check: Callable[[], None]) -> list[Array]:
        """Return a job's results.

        Args:
            operands: In the order of the job's frame.
            check: Called between steps; what it raises ends the call.

        Raises:
            ExhaustedError: The card has not the memory now.
            CudaError, CudnnError: The card or cuDNN failed.
        """
        check()
        if job.frame.total_bytes <= ARENA_BYTES:
            return self._run_small(job, operands)
        return self._run_large(job, operands, check)

    def _run_small(self, job: Job, operands: Sequence[Array]) -> list[Array]:
        for region, operand in zip(job.frame.operands, operands, strict=True):
            _view(self._pinned, region.offset, operand)[...] = operand
        try:
            self._launch(job)
        finally:
            self.stream.wait()
        results = [np.empty(spec.shape, spec.dtype) for spec in job.results]
        for region, result in zip(job.frame.results, results, strict=True):
            result[...] = _view(self._pinned, region.offset, result)
        return results

    def _launch(self, job: Job) -> None:
        graph = self._graphs.get(job.key, lambda: self._captured(job))
        if graph is None:
            self._enqueue_small(job)
        else:
            graph.launch(self.stream.pointer)

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

    def _run_large(
        self, job: Job, operands: Sequence[Array], check: Callable[[], None]
    ) -> list[Array]:
        with self._memory.take(job.frame.total_bytes) as base:
            try:
                for region, operand in zip(job.frame.operands, operands, strict=True):
                    self._staging.upload(operand, base + region.offset, check)
                check()
                job.enqueue(base, self.stream.pointer)
                results = [np.empty(spec.shape, spec.dtype) for spec in job.results]
                for region, result in zip(job.frame.results, results, strict=True):
                    self._staging.download(base + region.offset, result, check)
                return results
            finally:
                self.stream.wait()

    def close(self) -> None:
        """Forget all graphs. No call may be under way."""
        self._graphs.clear()


class _Graphs:
    """The graphs of kinds of calls that came before, the most recent ones."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, Graph | None] = OrderedDict()
        self._runs: OrderedDict[Hashable, int] = OrderedDict()

    def get(self, key: Hashable, capture: Callable[[], Graph | None]) -> Graph | None:
        """Return the graph of a kind of call, captured now if the kind has come often enough."""
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        runs = self._runs.pop(key, 0) + 1
        if runs <= _WARM_RUNS:
            self._runs[key] = runs
            _shrink(self._runs)
            return None
        graph = self._graphs[key] = capture()
        _shrink(self._graphs)
        return graph

    def clear(self) -> None:
        self._graphs.clear()
        self._runs.clear()


def _shrink(kinds: OrderedDict[Hashable, Any]) -> None:
    while len(kinds) > _GRAPHS_COUNT:
        kinds.popitem(last=False)


def _view(pinned: Bytes, offset: int, like: Array) -> Array:
    """Return the part of a buffer at `offset` as an array of the shape and type of another."""
    return np.ndarray(like.shape, like.dtype, pinned, offset)

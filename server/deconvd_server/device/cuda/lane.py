"""A lane of the card: one call at a time is uploaded, computed and downloaded, beside others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor

import numpy as np

from deconvd.copying import copy_into
from deconvd.problem import TensorSpec
from deconvd.tensor import Array
from deconvd_server.call import Call
from deconvd_server.device.cuda.cudnn import CudnnError
from deconvd_server.device.cuda.frame import Frame
from deconvd_server.device.cuda.job import Job
from deconvd_server.device.cuda.marks import Marks
from deconvd_server.device.cuda.memory import DeviceMemory, Region
from deconvd_server.device.cuda.plan import OPERAND_ALIGNMENT_BYTES
from deconvd_server.device.cuda.runtime import (
    CudaError,
    Graph,
    PinnedBuffer,
    Stream,
    copy,
    download,
    upload,
)
from deconvd_server.device.cuda.staging import Staging
from deconvd_server.device.cuda.tensor import CudaTensor, own
from deconvd_server.device.protocol import Operand
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
    """Calls that do the same work on other numbers, with the same tensors on the card.

    Args:
        operands_at, results_at: Addresses of those that lie on the card already; None for others.
    """

    def __init__(
        self,
        job: Job,
        operands_at: Sequence[int | None],
        results_at: Sequence[int | None],
    ) -> None:
        self.job = job
        self._operands_at, self._results_at = operands_at, results_at
        self.frame = Frame(
            [*map(_spec_to_place, job.operands, operands_at)],
            [*map(_spec_to_place, job.results, results_at)],
            job.workspace_bytes,
        )
        self.runs_count = 0
        self.graph: Graph | None = None

    def enqueue(self, base: int, stream: int) -> None:
        """Enqueue all work between upload and download on a stream.

        Args:
            base: Address of a block for the frame.
        """
        frame, job = self.frame, self.job
        operands = _addresses(base, frame.operands, self._operands_at)
        results = _addresses(base, frame.results, self._results_at)
        for address, at, spec in zip(operands, self._operands_at, job.operands, strict=True):
            if at is not None and at != address:
                copy(address, at, spec.nbytes, stream)
        job.enqueue(operands, results, base + frame.workspace.offset, stream)
        for address, at, spec in zip(results, self._results_at, job.results, strict=True):
            if at is not None and at != address:
                copy(at, address, spec.nbytes, stream)


def _spec_to_place(spec: TensorSpec, at: int | None) -> TensorSpec | None:
    """Return what needs room in a frame: None for a tensor that plans can use where it lies."""
    return None if at is not None and at % OPERAND_ALIGNMENT_BYTES == 0 else spec


def _addresses(base: int, regions: Sequence[Region | None], at: Sequence[int | None]) -> list[int]:
    """Return where tensors are during the call: in their regions of the block, or else where they lie."""
    return [
        base + region.offset if region is not None else lies_at or 0
        for region, lies_at in zip(regions, at, strict=True)
    ]


class Lane:
    """A stream with its buffers. Serves one call at a time; its thread has the card as its device.

    A small call lies in an arena that is always at the same place, so all it does, copies included,
    is captured as a graph when its kind comes again. A large one takes a block of its own. Tensors
    that lie on the card are used where they are, and do not count.

    Args:
        device_id: Whose tensors calls may use.
        memory: Where blocks come from.
        arena: Address of ARENA_BYTES on the card.
        helpers: Who copies large arrays within the host.
    """

    def __init__(self, device_id: str, memory: DeviceMemory, arena: int, helpers: Executor) -> None:
        self.stream = Stream()
        self._device_id = device_id
        self._memory = memory
        self._arena = arena
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
        operands: Sequence[Operand],
        places: Sequence[Operand],
        call: Call,
    ) -> None:
        """Compute the results of a call.

        Args:
            key: Of the job.
            prepare: Returns the job, if the lane does not remember it.
            operands: In the job's order.
            places: Where its results go, in its order.
            call: Whose it is: asked between steps whether it is still wanted, and told the times.

        Raises:
            ExhaustedError: The card has not the memory now.
            CudaError, CudnnError: The card or cuDNN failed.
            CallCancelledError, DeadlineError: The call has ended.
        """
        operands_at, results_at = ([*map(self._pointer, some)] for some in (operands, places))
        kind = self._kind(key, prepare, operands_at, results_at)
        call.check()
        if kind.frame.total_bytes <= ARENA_BYTES:
            self._run_small(kind, operands, places, call.ledger)
        else:
            self._run_large(kind, operands, places, call)

    def upload(self, array: Array, tensor: CudaTensor, call: Call) -> None:
        """Copy an array into a tensor."""
        with call.ledger.timing(Stage.UPLOAD):
            try:
                self._staging.upload(array, tensor.pointer, call.check)
            finally:
                self.stream.wait()

    def download(self, tensor: CudaTensor, array: Array, call: Call) -> None:
        """Copy a tensor into an array."""
        with call.ledger.timing(Stage.DOWNLOAD):
            try:
                self._fetch(tensor.pointer, array, call)
            finally:
                self.stream.wait()

    def close(self) -> None:
        """Forget all kinds of calls and their graphs. No call may be under way."""
        self._kinds.clear()

    def _pointer(self, tensor: Operand) -> int | None:
        """Return where a tensor lies on the card; None for an array."""
        if isinstance(tensor, np.ndarray):
            return None
        return own(tensor, self._device_id).pointer

    def _kind(
        self,
        key: Hashable,
        prepare: Callable[[], Job],
        operands_at: Sequence[int | None],
        results_at: Sequence[int | None],
    ) -> _Kind:
        whole_key = (key, *operands_at, *results_at)
        kind = self._kinds.get(whole_key)
        if kind is None:
            kind = self._kinds[whole_key] = _Kind(prepare(), operands_at, results_at)
            if len(self._kinds) > _KINDS_COUNT:
                self._kinds.popitem(last=False)
        else:
            self._kinds.move_to_end(whole_key)
        return kind

    def _run_small(
        self, kind: _Kind, operands: Sequence[Operand], places: Sequence[Operand], ledger: Ledger
    ) -> None:
        frame, job = kind.frame, kind.job
        with ledger.timing(Stage.UPLOAD):
            for region, spec, operand in zip(frame.operands, job.operands, operands, strict=True):
                if region is not None and isinstance(operand, np.ndarray):
                    self._view(region, spec)[...] = operand
        with ledger.timing(Stage.COMPUTE):  # and the card's own copies, which are part of the graph
            try:
                self._launch(kind)
            finally:
                self.stream.wait()
        with ledger.timing(Stage.DOWNLOAD):
            for region, spec, place in zip(frame.results, job.results, places, strict=True):
                if region is not None and isinstance(place, np.ndarray):
                    place[...] = self._view(region, spec)

    def _launch(self, kind: _Kind) -> None:
        kind.runs_count += 1
        if kind.runs_count == _WARM_RUNS + 1:
            kind.graph = self._captured(kind)
        if kind.graph is None:
            self._enqueue_small(kind)
        else:
            kind.graph.launch(self.stream.pointer)

    def _captured(self, kind: _Kind) -> Graph | None:
        try:
            return self.stream.capture(lambda: self._enqueue_small(kind))
        except (CudaError, CudnnError):
            return None  # some of cuDNN's engines do what no graph can hold

    def _enqueue_small(self, kind: _Kind) -> None:
        stream, frame = self.stream.pointer, kind.frame
        if frame.operands_bytes:
            upload(self._arena, self._pinned[: frame.operands_bytes], stream)
        kind.enqueue(self._arena, stream)
        if frame.results_bytes:
            end = frame.operands_bytes + frame.results_bytes
            results = self._pinned[frame.operands_bytes : end]
            download(results, self._arena + frame.operands_bytes, stream)

    def _run_large(
        self, kind: _Kind, operands: Sequence[Operand], places: Sequence[Operand], call: Call
    ) -> None:
        frame = kind.frame
        with self._memory.take(frame.total_bytes) as base:
            try:
                self._marks.begin()
                for region, operand in zip(frame.operands, operands, strict=True):
                    if region is not None and isinstance(operand, np.ndarray):
                        self._staging.upload(operand, base + region.offset, call.check)
                call.check()
                self._marks.end(Stage.UPLOAD)
                kind.enqueue(base, self.stream.pointer)
                self._marks.end(Stage.COMPUTE)
                for region, place in zip(frame.results, places, strict=True):
                    if region is not None and isinstance(place, np.ndarray):
                        self._fetch(base + region.offset, place, call)
                self._marks.end(Stage.DOWNLOAD)
            finally:
                self.stream.wait()
            self._marks.account(call.ledger)

    def _fetch(self, source: int, target: Array, call: Call) -> None:
        """Copy from the card to an array."""
        is_plain = target.flags.c_contiguous and target.dtype.isnative
        landing = target if is_plain else np.empty(target.shape, target.dtype.newbyteorder("="))
        self._staging.download(source, landing, call.check)
        if landing is not target:
            copy_into(target, landing)

    def _view(self, region: Region, spec: TensorSpec) -> Array:
        """Return the pinned memory that mirrors a region of the arena, as an array."""
        return np.ndarray(spec.shape, spec.dtype, self._pinned, region.offset)

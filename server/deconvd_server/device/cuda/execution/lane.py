"""A lane of the card: one call at a time is uploaded, computed and downloaded, beside others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor

import numpy as np

from deconvd.host.parallel_copy import copy_into
from deconvd.lru import Lru
from deconvd.model.dtypes import Array
from deconvd_server.call.context import CallContext
from deconvd_server.call.ledger import Ledger, Stage
from deconvd_server.device.arriving import Arriving, Operand, peek_tensor, require
from deconvd_server.device.cuda.api.host_memory import HostAddresses, RegisteredMemory
from deconvd_server.device.cuda.api.memory import BlockRegion, DeviceMemory
from deconvd_server.device.cuda.api.runtime import PinnedBuffer, Stream, download, upload
from deconvd_server.device.cuda.execution.call_kind import CallKind
from deconvd_server.device.cuda.execution.job import DeviceWork
from deconvd_server.device.cuda.execution.pipeline import Pipeline
from deconvd_server.device.cuda.execution.stage_timer import StageTimer
from deconvd_server.device.cuda.execution.staging import Staging, bytes_of
from deconvd_server.device.cuda.tensors.tensor import CudaTensor, as_cuda_tensor
from deconvd_server.device.tensor import Tensor

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

_DIRECT_BYTES = 256 << 10
"""From this size on, a copy of its own by the card costs less than one to pinned memory and back."""


class Lane:
    """A stream with its buffers. Serves one call at a time; its thread has the card as its device.

    A small call lies in an arena that is always at the same place, so all it does, copies included,
    is captured as a graph when its kind comes again; if the card reaches large arrays of it in host
    memory, it copies those by themselves, and the graph is of the rest. A large call takes a block
    of its own; if the card reaches its arrays, it is computed in the job's steps, or y in parts of its
    samples, so that copies both ways and work overlap. Tensors that lie on the card are used where
    they are, and do not count.

    Args:
        device_id: Whose tensors calls may use.
        memory: Where blocks come from.
        arena: Address of ARENA_BYTES on the card.
        helpers: Who copies large arrays within the host.
        host_memory: What the card reaches.
    """

    def __init__(
        self,
        device_id: str,
        memory: DeviceMemory,
        arena: int,
        helpers: Executor,
        host_memory: RegisteredMemory,
    ) -> None:
        self.stream = Stream()
        self._device_id = device_id
        self._memory = memory
        self._arena = arena
        self._host_memory = host_memory
        self._pinned = PinnedBuffer(ARENA_BYTES).bytes
        self._staging = Staging(
            self.stream, helpers, host_memory, slots_count=_SLOTS_COUNT, slot_bytes=_SLOT_BYTES
        )
        self._timer = StageTimer(self.stream)
        self.pipeline = Pipeline(self.stream, memory, self._staging, host_memory, self._pinned)
        self._kinds: Lru[Hashable, CallKind] = Lru(_KINDS_COUNT)

    def run(
        self,
        key: Hashable,
        prepare: Callable[[], DeviceWork],
        operands: Sequence[Operand],
        places: Sequence[Tensor],
        call: CallContext,
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
            ArrivalTimeoutError: Its operands do not arrive in time.
        """
        operands_at, results_at = ([*map(self._pointer, some)] for some in (operands, places))
        is_mirrored = not any(map(self._is_direct, (*operands, *places)))
        whole_key = (key, is_mirrored, *operands_at, *results_at)
        kind = self._kinds.get(whole_key)
        if kind is None:
            kind = self._kinds.put(whole_key, CallKind(prepare(), operands_at, results_at))
        call.check()
        is_large = kind.layout.total_bytes > ARENA_BYTES
        if is_large and self.pipeline.run_steps(kind, operands, places, call):
            return
        tensors = [*map(require, operands)]
        if is_large:
            self._run_large(kind, tensors, places, call)
        elif is_mirrored:
            self._run_mirrored(kind, tensors, places, call.ledger)
        else:
            self._run_direct(kind, tensors, places, call.ledger)

    def run_in_parts(
        self,
        key: Hashable,
        prepare: Callable[[], DeviceWork],
        count: int,
        operands: Sequence[Operand],
        y: Array,
        places: HostAddresses,
        call: CallContext,
    ) -> None:
        """Compute y in parts of its samples.

        Args:
            key, prepare: As for `run`, for a part.
            count: As `count_parts` returns it.
            operands: x, then those that are not divided.
            places: Of x and y.

        Raises as `run` does.
        """
        at = [*map(self._pointer, operands)]
        whole_key = (key, count, *at)
        kind = self._kinds.get(whole_key)
        if kind is None:
            kind = self._kinds.put(whole_key, CallKind(prepare(), at, [None], parts_count=count))
        self.pipeline.run(kind, operands, y, places, call)

    def upload(self, array: Array, tensor: CudaTensor, call: CallContext) -> None:
        """Copy an array into a tensor."""
        with call.ledger.measure(Stage.UPLOAD):
            try:
                self._staging.upload(array, tensor.pointer, call.check)
            finally:
                self.stream.wait()

    def download(self, tensor: CudaTensor, array: Array, call: CallContext) -> None:
        """Copy a tensor into an array."""
        with call.ledger.measure(Stage.DOWNLOAD):
            try:
                self._fetch(tensor.pointer, array, call)
            finally:
                self.stream.wait()

    def close(self) -> None:
        """Forget all kinds of calls and their graphs. No call may be under way."""
        self._kinds.clear()

    def _pointer(self, operand: Operand) -> int | None:
        """Return where a tensor is on the card; None for an array."""
        if isinstance(operand, (np.ndarray, Arriving)):
            return None
        return as_cuda_tensor(operand, self._device_id).pointer

    def _is_direct(self, operand: Operand) -> bool:
        """Return whether the card is to copy an array by itself, be the call small or large."""
        tensor = peek_tensor(operand)
        return (
            isinstance(tensor, np.ndarray)
            and tensor.nbytes >= _DIRECT_BYTES
            and self._host_memory.holds(tensor)
        )

    def _run_mirrored(
        self, kind: CallKind, operands: Sequence[Tensor], places: Sequence[Tensor], ledger: Ledger
    ) -> None:
        """Run a small call: its arrays go through pinned memory that mirrors the arena."""
        with ledger.measure(Stage.UPLOAD):
            for region, operand in _copied_regions(kind.layout.operands, operands):
                self._mirror(region, operand)[...] = operand
        with ledger.measure(
            Stage.COMPUTE
        ):  # and the card's own copies, which are part of the graph
            try:
                kind.launch(self.stream, lambda: self._enqueue_mirrored(kind))
            finally:
                self.stream.wait()
        with ledger.measure(Stage.DOWNLOAD):
            for region, place in _copied_regions(kind.layout.results, places):
                place[...] = self._mirror(region, place)

    def _enqueue_mirrored(self, kind: CallKind) -> None:
        stream, frame = self.stream.pointer, kind.layout
        if frame.operands_bytes:
            upload(self._arena, self._pinned[: frame.operands_bytes], stream)
        kind.enqueue(self._arena, stream)
        if frame.results_bytes:
            end = frame.operands_bytes + frame.results_bytes
            results = self._pinned[frame.operands_bytes : end]
            download(results, self._arena + frame.operands_bytes, stream)

    def _run_direct(
        self, kind: CallKind, operands: Sequence[Tensor], places: Sequence[Tensor], ledger: Ledger
    ) -> None:
        """Run a small call of which the card reaches some arrays; the others are mirrored one by one."""
        stream, mirrored = self.stream.pointer, []
        try:
            self._timer.begin()
            for region, operand in _copied_regions(kind.layout.operands, operands):
                source = operand
                if not self._is_direct(operand):
                    source = self._mirror(region, operand)
                    source[...] = operand
                upload(self._arena + region.offset, bytes_of(source), stream)
            self._timer.end(Stage.UPLOAD)
            kind.launch(self.stream, lambda: kind.enqueue(self._arena, stream))
            self._timer.end(Stage.COMPUTE)
            for region, place in _copied_regions(kind.layout.results, places):
                target = place
                if not self._is_direct(place):
                    target = self._mirror(region, place)
                    mirrored.append((target, place))
                download(bytes_of(target), self._arena + region.offset, stream)
            self._timer.end(Stage.DOWNLOAD)
        finally:
            self.stream.wait()
        for target, place in mirrored:
            place[...] = target
        self._timer.record_stages(ledger)

    def _run_large(
        self,
        kind: CallKind,
        operands: Sequence[Tensor],
        places: Sequence[Tensor],
        call: CallContext,
    ) -> None:
        frame = kind.layout
        with self._memory.lease(frame.total_bytes) as base:
            try:
                self._timer.begin()
                for region, operand in _copied_regions(frame.operands, operands):
                    self._staging.upload(operand, base + region.offset, call.check)
                call.check()
                self._timer.end(Stage.UPLOAD)
                kind.enqueue(base, self.stream.pointer)
                self._timer.end(Stage.COMPUTE)
                for region, place in _copied_regions(frame.results, places):
                    self._fetch(base + region.offset, place, call)
                self._timer.end(Stage.DOWNLOAD)
            finally:
                self.stream.wait()
            self._timer.record_stages(call.ledger)

    def _fetch(self, source: int, target: Array, call: CallContext) -> None:
        """Copy from the card to an array."""
        is_plain = target.flags.c_contiguous and target.dtype.isnative
        landing = target if is_plain else np.empty(target.shape, target.dtype.newbyteorder("="))
        self._staging.download(source, landing, call.check)
        if landing is not target:
            copy_into(target, landing)

    def _mirror(self, region: BlockRegion, array: Array) -> Array:
        """Return the pinned memory that mirrors a region of the arena, as an array like another."""
        dtype = array.dtype.newbyteorder("=")
        return np.ndarray(array.shape, dtype, self._pinned, region.offset)


def _copied_regions(
    regions: Sequence[BlockRegion | None], tensors: Sequence[Tensor]
) -> Iterator[tuple[BlockRegion, Array]]:
    """Yield the arrays that are to be copied to the card or from it, each with its region there."""
    for region, tensor in zip(regions, tensors, strict=True):
        if region is not None and isinstance(tensor, np.ndarray):
            yield region, tensor

"""A lane of a card, a stream with its buffers: uploads, computes and downloads one call at a time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor

import numpy as np

from deconvd.host.parallel_copy import copy_into
from deconvd.lru import Lru
from deconvd.model.dtypes import Array
from deconvd_server.call.context import CallContext
from deconvd_server.call.ledger import Stage
from deconvd_server.device.arriving import Arriving, Operand, peek_tensor, require
from deconvd_server.device.cuda.api.host_memory import HostAddresses, RegisteredMemory
from deconvd_server.device.cuda.api.memory import BlockRegion, DeviceMemory
from deconvd_server.device.cuda.api.runtime import PinnedBuffer, Stream, download, upload
from deconvd_server.device.cuda.cuda_tensor import CudaTensor, as_cuda_tensor
from deconvd_server.device.cuda.execution.call_kind import CallKind
from deconvd_server.device.cuda.execution.device_work import DeviceWork
from deconvd_server.device.cuda.execution.pipeline import Pipeline
from deconvd_server.device.cuda.execution.stage_timer import StageTimer
from deconvd_server.device.cuda.execution.staging import Staging, bytes_of
from deconvd_server.device.departing import Departing, Place, target_of
from deconvd_server.device.tensor import Tensor

__all__ = ["ARENA_BYTES", "COPIED_BYTES", "PINNED_BYTES", "Lane"]

ARENA_BYTES = 8 << 20
"""Size of a lane's arena. A small call's operands, results and workspace fit in it; graphs are bound to it."""

_SLOTS_COUNT = 8

_SLOT_BYTES = 4 << 20
"""Size of a staging buffer. Of the sizes that were measured, this one keeps the bus busiest with large arrays."""

PINNED_BYTES = ARENA_BYTES + _SLOTS_COUNT * _SLOT_BYTES
"""Pinned host memory of a lane: a mirror of the arena, and staging buffers."""

COPIED_BYTES = 1 << 20
"""A tensor on the card of up to this size is copied to the block of a call in parts.

That takes microseconds. Otherwise each tensor, such as each tenant's W, would have graphs of its own.
"""

_KINDS_COUNT = 64
"""Kinds of calls that a lane remembers. Each may hold graphs."""

_DIRECT_BYTES = 256 << 10
"""Smallest array that the card copies from or to its own place in a small call.

A copy of its own costs the card less than a copy to pinned memory costs the host.
"""


class Lane:
    """A stream with its buffers. Serves one call at a time, whose thread must have the card as its device.

        small, up to ARENA_BYTES    mirrored    all arrays are copied to pinned memory, and from there by the graph
                                    direct      the card copies large arrays from and to their own places
        large                       pipeline    in parts or steps that overlap, if the card reaches its arrays
                                    staged      through a ring of pinned buffers

    A small call uses the arena, which never moves. So the whole call, copies included, is captured as a CUDA graph once
    its kind has come often enough; in a direct call the graph holds the work alone. A large call gets a block of its
    own. Tensors on the card are used where they are, and do not count for the size.

    Args:
        device_id: The device whose tensors calls may use.
        memory: Where blocks come from.
        arena: Address of ARENA_BYTES on the card.
        helpers: Threads that copy large arrays within the host.
        host_memory: The memory that the card reaches.
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
        make_work: Callable[[], DeviceWork],
        operands: Sequence[Operand],
        places: Sequence[Place],
        call: CallContext,
    ) -> None:
        """Compute the results of a call.

        Args:
            key: Of the work.
            make_work: Returns the work. Called if the lane does not remember it.
            operands: In the work's order.
            places: Where the results go, in the work's order. Of departing ones only the pipeline notes what it has
                written.
            call: Checked between steps. Its ledger gets the durations.

        Raises:
            ExhaustedError: The card has no memory for it now.
            CudaError, CudnnError: The card or cuDNN failed.
            CallCancelledError, DeadlineError: The call has ended.
            ArrivalTimeoutError: Its operands do not arrive in time.
        """
        targets = [*map(target_of, places)]
        operands_at, results_at = ([*map(self._pointer, some)] for some in (operands, targets))
        is_mirrored = not any(map(self._is_direct, (*operands, *targets)))
        # Graphs of a kind copy from and to fixed addresses on the card. Those are part of the key.
        kind_key = (key, is_mirrored, *operands_at, *results_at)
        kind = self._find_kind(
            kind_key, lambda: CallKind(make_work(), operands_at, results_at), call
        )
        call.check()
        is_large = kind.layout.total_bytes > ARENA_BYTES
        if is_large and self.pipeline.run_steps(kind, operands, places, call):
            return
        tensors = [*map(require, operands)]  # only the pipeline takes operands that are arriving
        if is_large:
            self._run_large(kind, tensors, targets, call)
        elif is_mirrored:
            self._run_mirrored(kind, tensors, targets, call)
        else:
            self._run_direct(kind, tensors, targets, call)

    def run_in_parts(
        self,
        key: Hashable,
        make_work: Callable[[], DeviceWork],
        count: int,
        operands: Sequence[Operand],
        y: Array | Departing,
        addresses: HostAddresses,
        call: CallContext,
    ) -> None:
        """Compute y in parts of its samples.

        Args:
            key, make_work: As for `run`, for one part.
            count: Of parts, as `count_parts` returns it.
            operands: x, then those that are not divided.
            addresses: Of x and y.

        Raises as `run` does.
        """
        operands_at: list[int | None] = []
        copied_from: list[int | None] = []
        for operand in operands:
            pointer = self._pointer(operand)
            is_copied = pointer is not None and _size_bytes(operand) <= COPIED_BYTES
            operands_at.append(None if is_copied else pointer)
            copied_from.append(pointer if is_copied else None)
        kind_key = (key, count, *operands_at, *(pointer is None for pointer in copied_from))
        kind = self._find_kind(
            kind_key, lambda: CallKind(make_work(), operands_at, [None], parts_count=count), call
        )
        self.pipeline.run(kind, operands, copied_from, y, addresses, call)

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

    def _find_kind(
        self, key: Hashable, make: Callable[[], CallKind], call: CallContext
    ) -> CallKind:
        """Return the kind of a call: one that is remembered, unless there are better plans by now."""
        kind = self._kinds.get(key)
        if kind is None or (kind.work.stand_ins and not kind.may_serve()):
            call.note_long()  # plans may have to be chosen first
            kind = self._kinds.put(key, make())
        return kind

    def _pointer(self, operand: Operand) -> int | None:
        """Return where a tensor is on the card; None for an array."""
        if isinstance(operand, (np.ndarray, Arriving)):
            return None
        return as_cuda_tensor(operand, self._device_id).pointer

    def _is_direct(self, operand: Operand) -> bool:
        """Return whether the card should copy an array from or to its own place, even in a small call."""
        tensor = peek_tensor(operand)
        return (
            isinstance(tensor, np.ndarray)
            and tensor.nbytes >= _DIRECT_BYTES
            and self._host_memory.holds(tensor)
        )

    def _run_mirrored(
        self,
        kind: CallKind,
        operands: Sequence[Tensor],
        places: Sequence[Tensor],
        call: CallContext,
    ) -> None:
        """Run a small call. Its arrays go through pinned memory that mirrors the arena."""
        ledger = call.ledger
        with ledger.measure(Stage.UPLOAD):
            for region, operand in _copied_regions(kind.layout.operands, operands):
                self._mirror(region, operand)[...] = operand
        call.check()
        with ledger.measure(Stage.COMPUTE):  # the card's copies count here: the graph has them too
            try:
                kind.launch(self.stream, lambda: self._enqueue_mirrored(kind))
            finally:
                self.stream.wait()  # also after an error: the next call uses the same arena and mirror
        call.check()
        with ledger.measure(Stage.DOWNLOAD):
            for region, place in _copied_regions(kind.layout.results, places):
                place[...] = self._mirror(region, place)

    def _enqueue_mirrored(self, kind: CallKind) -> None:
        stream, layout = self.stream.pointer, kind.layout
        if layout.operands_bytes:  # one copy for all operands, and one for all results
            upload(self._arena, self._pinned[: layout.operands_bytes], stream)
        kind.enqueue(self._arena, stream)
        if layout.results_bytes:
            end = layout.operands_bytes + layout.results_bytes
            results = self._pinned[layout.operands_bytes : end]
            download(results, self._arena + layout.operands_bytes, stream)

    def _run_direct(
        self,
        kind: CallKind,
        operands: Sequence[Tensor],
        places: Sequence[Tensor],
        call: CallContext,
    ) -> None:
        """Run a small call of which the card reaches some large arrays. The others are mirrored one by one."""
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
            call.check()
            kind.launch(self.stream, lambda: kind.enqueue(self._arena, stream))
            self._timer.end(Stage.COMPUTE)
            call.check()
            for region, place in _copied_regions(kind.layout.results, places):
                target = place
                if not self._is_direct(place):
                    target = self._mirror(region, place)
                    mirrored.append((target, place))
                download(bytes_of(target), self._arena + region.offset, stream)
            self._timer.end(Stage.DOWNLOAD)
        finally:
            self.stream.wait()  # also after an error: the card may still use the caller's arrays
        for target, place in mirrored:
            place[...] = target
        self._timer.record_stages(call.ledger)

    def _run_large(
        self,
        kind: CallKind,
        operands: Sequence[Tensor],
        places: Sequence[Tensor],
        call: CallContext,
    ) -> None:
        """Run a large call, stage after stage, through the staging buffers where the card does not reach an array."""
        layout = kind.layout
        with self._memory.lease(layout.total_bytes, call.check) as base:
            try:
                self._timer.begin()
                for region, operand in _copied_regions(layout.operands, operands):
                    self._staging.upload(operand, base + region.offset, call.check)
                call.check()
                self._timer.end(Stage.UPLOAD)
                kind.enqueue(base, self.stream.pointer)
                self._timer.end(Stage.COMPUTE)
                call.check()
                for region, place in _copied_regions(layout.results, places):
                    self._fetch(base + region.offset, place, call)
                self._timer.end(Stage.DOWNLOAD)
            finally:
                self.stream.wait()  # before the block is freed, which may be used on any stream then
            self._timer.record_stages(call.ledger)

    def _fetch(self, source: int, target: Array, call: CallContext) -> None:
        """Copy from the card to an array of any strides and byte order."""
        is_plain = target.flags.c_contiguous and target.dtype.isnative
        plain = target if is_plain else np.empty(target.shape, target.dtype.newbyteorder("="))
        self._staging.download(source, plain, call.check)
        if (
            plain is not target
        ):  # a new array is not registered: `download` has returned with all of it
            copy_into(target, plain)

    def _mirror(self, region: BlockRegion, array: Array) -> Array:
        """Return the pinned memory that mirrors a region of the arena, with the shape and type of an array."""
        dtype = array.dtype.newbyteorder("=")
        return np.ndarray(array.shape, dtype, self._pinned, region.offset)


def _size_bytes(operand: Operand) -> int:
    tensor = peek_tensor(operand)
    return tensor.nbytes if isinstance(tensor, np.ndarray) else tensor.spec.nbytes


def _copied_regions(
    regions: Sequence[BlockRegion | None], tensors: Sequence[Tensor]
) -> Iterator[tuple[BlockRegion, Array]]:
    """Yield the arrays to copy to or from the card, each with its region there."""
    for region, tensor in zip(regions, tensors, strict=True):
        if region is not None and isinstance(tensor, np.ndarray):
            yield region, tensor

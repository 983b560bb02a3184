"""Large calls, in parts or in steps: uploads, work and downloads overlap, each on a stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Final

import numpy as np

from deconvd.model.dtypes import Array
from deconvd_server.call.context import CallContext
from deconvd_server.call.ledger import Stage
from deconvd_server.device.arriving import (
    ArrivalTimeoutError,
    Arriving,
    Operand,
    OverlappedOperands,
    peek_tensor,
)
from deconvd_server.device.cuda.api.host_memory import HostAddresses, RegisteredMemory
from deconvd_server.device.cuda.api.memory import BlockLayout, DeviceMemory
from deconvd_server.device.cuda.api.runtime import Bytes, Event, Stream, copy, download, upload
from deconvd_server.device.cuda.execution.call_kind import CallKind, tensor_addresses
from deconvd_server.device.cuda.execution.departures import Departures
from deconvd_server.device.cuda.execution.operand_uploader import OperandUploader
from deconvd_server.device.cuda.execution.reachable import ReachableMemory
from deconvd_server.device.cuda.execution.stage_timer import StageTimer
from deconvd_server.device.cuda.execution.staging import Staging, bytes_of
from deconvd_server.device.departing import Departing, Place, target_of
from deconvd_server.device.tensor import Tensor

__all__ = ["Pipeline"]

_EARLY_BYTES: Final = 128 << 20
"""Smallest result that leaves in parts even if all operands are there.

A graph's downloads cannot be told apart until all of it is done, which delays a smaller result by less than 3 ms. To
enqueue its parts one by one takes the host half a millisecond with the interpreter's lock, for which other calls wait.
"""


class Pipeline:
    """Computes calls whose large arrays the card reaches by itself, with three streams.

    A call in three parts:

        upload    begin [ W ][ x0 ][ x1 ][ x2 ]                         end
                                 |     |     |                         ^  ^
        compute                  '>[y0]'>[y1]'>[y2]--------------------'  |
                                      |     |     |                       |
        download                      '>[y0]'>[y1]'>[y2]------------------'

    An arrow is `Stream.fork`: the work at its head waits, on the card, for all that its stream has before its tail. No
    arrow goes back up before the end. Each part has its own place in the block, so an upload never overwrites what is
    still read. Only the workspace is shared, by the work of all parts, which is in one stream.

    The bus takes longest, so it must start early and never wait for the host. Once a call of the same kind has come
    before, all of it is captured, and launched as one graph. Departing results are noted as written: each part as soon
    as it is downloaded, if the host enqueues the parts; a graph leaves it to the engine, which notes all in the end.

    Args:
        stream: The compute stream, which the pipeline shares with its lane.
        memory: Where blocks come from.
        staging: Copies operands that the card does not reach, on the compute stream.
        host_memory: The memory that the card reaches.
        pinned: Memory for copies of small arrays that it does not reach.
    """

    def __init__(
        self,
        stream: Stream,
        memory: DeviceMemory,
        staging: Staging,
        host_memory: RegisteredMemory,
        pinned: Bytes,
    ) -> None:
        self._upload_stream = Stream()
        self._compute_stream = stream
        self._download_stream = Stream()
        self._memory = memory
        self._staging = staging
        self._reachable = ReachableMemory(host_memory, pinned)
        self._uploader = OperandUploader(self._upload_stream, self._reachable)
        self._timer = StageTimer(stream)
        self._departures = Departures(Event)

    def run(
        self,
        kind: CallKind,
        operands: Sequence[Operand],
        copied_from: Sequence[int | None],
        y: Array | Departing,
        addresses: HostAddresses,
        call: CallContext,
    ) -> None:
        """Compute y in parts. Operands that are still arriving are uploaded piece by piece.

        Parts of y that were noted as written before are left out: the call is repeated, since operands took too long.

        Args:
            kind: The call's, with as many parts as `count_parts` returns.
            operands: x, then those that are not divided.
            copied_from: The addresses of operands on the card that are copied to the block; None for the others.
            addresses: Of x and y.

        Raises as `Lane.run` does.
        """
        overlapped = OverlappedOperands(operands)
        x, *others = overlapped.operands
        # With operands yet to arrive the call is no graph. Its parts are: so the host keeps up with x as it arrives.
        as_one = overlapped.are_complete and not _leave_early([y])
        enqueue_parts = partial(self._enqueue_parts, kind, as_graphs=not as_one)

        def enqueue(base: int) -> None:
            # Before what may be a graph, which is then the same wherever these operands are.
            for source_at, region, spec in zip(
                copied_from, kind.layout.operands, kind.work.operands, strict=True
            ):
                if source_at is not None and region is not None:
                    target_at = base + region.offset
                    copy(target_at, source_at, spec.nbytes, self._upload_stream.pointer)
            reachable = self._reachable.make_reachable(others, BlockLayout(), overlapped)
            if reachable is None:
                # A large operand goes through staging buffers, which the host fills meanwhile: no graph can hold that.
                upload_array = partial(self._staging.upload, check=call.check)
                enqueue_parts(base, [x, *others], y, upload_array, overlapped)
                return
            tensors = [x, *(other.operand for other in reachable)]
            registered = [o.registered for o in reachable if o.registered is not None]
            bound_to = base, *(other.registered is None for other in reachable)
            work = partial(enqueue_parts, base, tensors, y, self._uploader.upload, overlapped)
            all_addresses = addresses.with_arrays(registered) if registered else addresses
            self._launch(kind, work, bound_to, all_addresses, as_one=as_one)

        self._run(kind, call, enqueue, overlapped)

    def run_steps(
        self,
        kind: CallKind,
        operands: Sequence[Operand],
        places: Sequence[Place],
        call: CallContext,
    ) -> bool:
        """Compute all results in the steps of the kind's work. Return False, with nothing done, if that cannot be.

        It cannot be if the card does not reach all large arrays.

        Args:
            kind: The call's, in one part.
            operands, places: In the order of its work. Steps whose results were all noted as written are left out.

        Raises as `Lane.run` does.
        """
        overlapped = OverlappedOperands(operands)
        # Read before the addresses: if memory is registered or given up between, the graph is not taken for one of now.
        generation, mirrors = self._reachable.generation, BlockLayout()
        results = [*map(target_of, places)]
        targets = self._reachable.make_reachable(results, mirrors, None)
        if targets is None:
            return False
        sources = self._reachable.make_reachable(overlapped.operands, mirrors, overlapped)
        if sources is None:
            return False
        given = [source.operand for source in sources]
        made = [peek_tensor(target.operand) for target in targets]
        tensors = [*sources, *targets]
        registered = [t.registered for t in tensors if t.registered is not None]
        addresses = HostAddresses.of(generation, registered)

        def enqueue(base: int) -> None:
            bound_to = base, *(tensor.registered is None for tensor in tensors)
            work = partial(self._enqueue_steps, kind, base, given, made, places, overlapped)
            as_one = overlapped.are_complete and not _leave_early(places)
            self._launch(kind, work, bound_to, addresses, as_one=as_one)

        self._run(kind, call, enqueue, overlapped)
        for result, target in zip(results, made, strict=True):
            if isinstance(result, np.ndarray) and target is not result:  # target is a mirror
                result[...] = target
        return True

    def _run(
        self,
        kind: CallKind,
        call: CallContext,
        enqueue: Callable[[int], None],
        overlapped: OverlappedOperands,
    ) -> None:
        """Have a call enqueued, given the address of a block for the kind's layout, and wait for it."""
        with self._memory.lease(kind.layout.total_bytes, call.check) as base:
            call.check()
            try:
                enqueue(base)
                self._departures.wait()
                self._upload_stream.wait()  # `_end` has let the other two join it
            except ArrivalTimeoutError:
                self._wait_for_streams()
                self._departures.wait()  # the call is repeated for the other parts
                raise
            except BaseException:
                self._wait_for_streams()
                raise
            finally:
                self._departures.clear()
            self._timer.record_stages(call.ledger)
            if overlapped.is_overlapped:  # also if all operands were there when first looked at
                call.ledger.add(Stage.OVERLAP, overlapped.waited_s)

    def _wait_for_streams(self) -> None:
        """Wait for each stream. After an error they may not have joined.

        The card must be done with the block and with the caller's arrays before anyone else gets them.
        """
        for stream in (self._upload_stream, self._compute_stream, self._download_stream):
            stream.wait()

    def _launch(
        self,
        kind: CallKind,
        work: Callable[[], None],
        bound_to: Hashable,
        addresses: HostAddresses,
        *,
        as_one: bool,
    ) -> None:
        """Enqueue a call: as a graph if it can be one, else as it is.

        Args:
            bound_to: The block, and which arrays are mirrored. Mirrors are in the same place whenever the same arrays
                have one.
            addresses: Of the arrays in registered memory.
            as_one: Whether it may be a graph. Operands that arrive make the host wait between copies.
        """
        # In arrays that overlap, an address does not tell which array a copy of the graph belongs to.
        if as_one and addresses.are_disjoint:
            kind.launch(self._upload_stream, work, bound_to, addresses)
        else:
            work()

    def _enqueue_parts(
        self,
        kind: CallKind,
        base: int,
        operands: Sequence[Operand],
        y: Array | Departing,
        upload_array: Callable[[Array, int], None],
        overlapped: OverlappedOperands,
        *,
        as_graphs: bool,
    ) -> None:
        """Enqueue a call in parts: see the picture in `Pipeline`.

        Args:
            base: Address of a block for the kind's layout.
            upload_array: Enqueues a copy of an operand that is not divided, on the upload or the compute stream.
            overlapped: Waits for operands that are still arriving.
            as_graphs: Whether the work of each part is a graph. It must not be if all of this is captured.

        Raises:
            ArrivalTimeoutError: They do not arrive in time.
        """
        up, work, down = self._upload_stream, self._compute_stream, self._download_stream
        x, *others = operands
        source, target = peek_tensor(x), target_of(y)
        assert isinstance(source, np.ndarray)
        assert isinstance(target, np.ndarray)
        x_at, *used_at = tensor_addresses(base, kind.layout.operands, kind.operand_addresses)
        (y_at,) = tensor_addresses(base, kind.layout.results, kind.result_addresses)
        workspace = base + kind.layout.workspace.offset
        self._begin()
        for other, address, used in zip(others, kind.operand_addresses[1:], used_at, strict=True):
            self._uploader.place(other, address, used, upload_array, overlapped)
        written_bytes = y.written_bytes if isinstance(y, Departing) else 0
        x_end = y_end = 0
        for x_part, y_part in zip(
            _parts(source, kind.parts_count), _parts(target, kind.parts_count), strict=True
        ):
            x_begin, x_end = x_end, x_end + x_part.nbytes
            y_begin, y_end = y_end, y_end + y_part.nbytes
            if y_end <= written_bytes:
                continue
            if isinstance(x, Arriving):
                # the host waits: the card has the parts before it to do
                overlapped.wait_for(x, x_end)
                self._departures.note_finished()
            upload(x_at + x_begin, x_part, up.pointer)
            up.fork(work)  # the part's x, and before it all of W and b, must be there
            part_at = [x_at + x_begin, *used_at]
            self._compute_part(kind, part_at, y_at + y_begin, workspace, as_graph=as_graphs)
            work.fork(
                down
            )  # the part's y must be computed; the next part's x is uploaded meanwhile
            download(y_part, y_at + y_begin, down.pointer)
            self._record_departure(y, y_end)
        self._end()

    def _enqueue_steps(
        self,
        kind: CallKind,
        base: int,
        operands: Sequence[Operand],
        results: Sequence[Tensor],
        places: Sequence[Place],
        overlapped: OverlappedOperands,
    ) -> None:
        """Enqueue a call in steps, as `_enqueue_parts` does in parts.

        Each step uploads the operands that it is the first to need, and downloads its results.

        Args:
            results: Where the card writes the results: in their places, or in mirrors of these.
        """
        up, work, down = self._upload_stream, self._compute_stream, self._download_stream
        operands_at = tensor_addresses(base, kind.layout.operands, kind.operand_addresses)
        results_at = tensor_addresses(base, kind.layout.results, kind.result_addresses)
        workspace = base + kind.layout.workspace.offset
        is_placed = [False] * len(operands)
        self._begin()
        for step in kind.work.steps:
            if all(_is_written(places[number]) for number in step.results):
                continue
            for number in step.operands:
                if not is_placed[number]:
                    address, target = kind.operand_addresses[number], operands_at[number]
                    self._uploader.place(
                        operands[number], address, target, self._uploader.upload, overlapped
                    )
                    is_placed[number] = True
            self._departures.note_finished()
            up.fork(work)  # the step's operands must be there
            step.enqueue(operands_at, results_at, workspace, work.pointer)
            work.fork(
                down
            )  # its results must be computed; the next step's operands are uploaded meanwhile
            for number in step.results:
                result, made_at = results[number], results_at[number]
                address = kind.result_addresses[number]
                if isinstance(result, np.ndarray):
                    download(bytes_of(result), made_at, down.pointer)
                    if result is target_of(places[number]):  # it is no mirror
                        self._record_departure(places[number], result.nbytes)
                elif address is not None and address != made_at:  # not aligned as plans need it
                    copy(address, made_at, result.spec.nbytes, down.pointer)
        self._end()

    def _record_departure(self, place: Place, size_bytes: int) -> None:
        """Have the first bytes of a departing result noted as written once they are downloaded."""
        if isinstance(place, Departing) and not self._upload_stream.is_capturing:
            self._departures.record(place, size_bytes, self._download_stream.pointer)

    def _begin(self) -> None:
        """Mark the begin of the first stage. In a capture, this is where the graph begins."""
        self._timer.begin(self._upload_stream, in_graph=self._upload_stream.is_capturing)

    def _end(self) -> None:
        """Mark the ends of the stages, and let the other streams join the upload stream.

        The host then waits for one stream alone, and a capture must end in the stream that it began in.
        """
        in_graph = self._upload_stream.is_capturing
        self._timer.end(Stage.UPLOAD, self._upload_stream, in_graph=in_graph)
        self._timer.end(Stage.COMPUTE, self._compute_stream, in_graph=in_graph)
        self._timer.end(Stage.DOWNLOAD, self._download_stream, in_graph=in_graph)
        self._compute_stream.fork(self._upload_stream)
        self._download_stream.fork(self._upload_stream)

    def _compute_part(
        self, kind: CallKind, operands: Sequence[int], y: int, workspace: int, *, as_graph: bool
    ) -> None:
        work = partial(kind.work.enqueue, operands, [y], workspace, self._compute_stream.pointer)
        if as_graph:
            kind.launch_part(self._compute_stream, work, (workspace, *operands, y))
        else:
            work()


def _is_written(place: Place) -> bool:
    return isinstance(place, Departing) and place.is_written


def _leave_early(places: Sequence[Place]) -> bool:
    """Return whether results leave part by part even if all operands are there, or have begun to leave."""
    departing = [place for place in places if isinstance(place, Departing)]
    return any(place.written_bytes or place.array.nbytes >= _EARLY_BYTES for place in departing)


def _parts(array: Array, count: int) -> list[Bytes]:
    """Return the bytes of equal parts of an array's samples."""
    whole = bytes_of(array)
    step = whole.size // count
    return [whole[begin : begin + step] for begin in range(0, whole.size, step)]

"""Calls of one kind: where their tensors lie on the card, and the graph that they are captured as."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence

from deconvd.model.problem import TensorSpec
from deconvd_server.device.cuda.api.host_memory import HostAddresses
from deconvd_server.device.cuda.api.memory import BlockRegion
from deconvd_server.device.cuda.api.runtime import CudaError, Stream, copy
from deconvd_server.device.cuda.cudnn import CudnnError
from deconvd_server.device.cuda.execution.device_layout import DeviceLayout
from deconvd_server.device.cuda.execution.graph_cache import GraphCache
from deconvd_server.device.cuda.execution.job import DeviceWork
from deconvd_server.device.cuda.execution.movable_graph import BoundGraph
from deconvd_server.device.cuda.plan import OPERAND_ALIGNMENT_BYTES

__all__ = ["CallKind", "layout_spec", "tensor_addresses"]

_log = logging.getLogger(__name__)

_NO_ADDRESSES = HostAddresses(0, (), ())


class CallKind:
    """Calls that do the same work on other numbers, with the same tensors on the card.

    Args:
        job: Of the call, or of one of its parts.
        operands_at, results_at: Addresses of those that lie on the card already; None for others.
        parts_count: In how many parts of its samples, one behind the other in the first operand and
            the results, a call is computed.

    Attributes:
        frame: Where all parts lie.
    """

    def __init__(
        self,
        job: DeviceWork,
        operands_at: Sequence[int | None],
        results_at: Sequence[int | None],
        *,
        parts_count: int = 1,
    ) -> None:
        self.work = job
        self.operand_addresses, self.result_addresses = operands_at, results_at
        self.parts_count = parts_count
        divided, *others = job.operands
        operands = [_join_parts(divided, parts_count), *others]
        results = [_join_parts(spec, parts_count) for spec in job.results]
        self.layout = DeviceLayout(
            [*map(layout_spec, operands, operands_at)],
            [*map(layout_spec, results, results_at)],
            job.workspace_bytes,
        )
        self._graphs: GraphCache[BoundGraph] = GraphCache()

    def enqueue(self, base: int, stream: int) -> None:
        """Enqueue all work between upload and download on a stream.

        Args:
            base: Address of a block for the frame.
        """
        frame, job = self.layout, self.work
        operands = tensor_addresses(base, frame.operands, self.operand_addresses)
        results = tensor_addresses(base, frame.results, self.result_addresses)
        for address, at, spec in zip(operands, self.operand_addresses, job.operands, strict=True):
            if at is not None and at != address:
                copy(address, at, spec.nbytes, stream)
        job.enqueue(operands, results, base + frame.workspace.offset, stream)
        for address, at, spec in zip(results, self.result_addresses, job.results, strict=True):
            if at is not None and at != address:
                copy(at, address, spec.nbytes, stream)

    def launch(
        self,
        stream: Stream,
        work: Callable[[], None],
        at: Hashable = None,
        places: HostAddresses = _NO_ADDRESSES,
    ) -> None:
        """Do what `work` enqueues on a stream: as a graph, once it comes again.

        Args:
            work: Always does the same where `at` is the same.
            at: The addresses on the card that it is bound to, where those change from call to call.
            places: Of arrays on the host that it copies from and to, apart from each other, where
                those change.
        """
        self._graphs.run(
            at,
            work,
            capture=lambda: _capture(stream, work, places),
            replay=lambda graph: _try_replay(graph, stream, places),
        )


def _capture(stream: Stream, work: Callable[[], None], places: HostAddresses) -> BoundGraph | None:
    try:
        return BoundGraph(stream.capture(work), places)
    except (CudaError, CudnnError) as error:
        _log.debug("done without a graph: %s", error)
        return None  # some of cuDNN's engines do what no graph can hold


def _try_replay(graph: BoundGraph, stream: Stream, places: HostAddresses) -> bool:
    try:
        graph.rebind(places)
    except CudaError as error:
        _log.debug("done without a graph: it does not let its copies be moved: %s", error)
        return False
    graph.launch(stream.pointer)
    return True


def _join_parts(part: TensorSpec, count: int) -> TensorSpec:
    samples_count, *sample = part.shape
    return TensorSpec((samples_count * count, *sample), part.dtype)


def layout_spec(spec: TensorSpec, at: int | None) -> TensorSpec | None:
    """Return what needs room in a frame: None for a tensor that plans can use where it lies."""
    return None if at is not None and at % OPERAND_ALIGNMENT_BYTES == 0 else spec


def tensor_addresses(
    base: int, regions: Sequence[BlockRegion | None], at: Sequence[int | None]
) -> list[int]:
    """Return where tensors are during the call: in their regions of the block, or else where they lie."""
    return [
        base + region.offset if region is not None else lies_at or 0
        for region, lies_at in zip(regions, at, strict=True)
    ]

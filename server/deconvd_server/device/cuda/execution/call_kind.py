"""A kind of call: its work, the layout of its tensors on the card, and the graphs that it was captured as."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence

from deconvd.model.problem import TensorSpec
from deconvd_server.device.cuda.api.host_memory import HostAddresses
from deconvd_server.device.cuda.api.memory import BlockRegion
from deconvd_server.device.cuda.api.runtime import CudaError, Stream, copy
from deconvd_server.device.cuda.cudnn import CudnnError
from deconvd_server.device.cuda.execution.bound_graph import BoundGraph
from deconvd_server.device.cuda.execution.device_layout import DeviceLayout
from deconvd_server.device.cuda.execution.device_work import DeviceWork
from deconvd_server.device.cuda.execution.graph_cache import GraphCache
from deconvd_server.device.cuda.plan import OPERAND_ALIGNMENT_BYTES

__all__ = ["CallKind", "layout_spec", "tensor_addresses"]

_log = logging.getLogger(__name__)

_NO_ADDRESSES = HostAddresses(0, (), ())


class CallKind:
    """Calls that do the same work with other numbers. Those of their tensors that are on the card are the same, too.

    Args:
        work: The work of a call, or of one of its parts.
        operand_addresses, result_addresses: Addresses of tensors that are on the card; None for arrays.
        parts_count: Parts in which a call is computed. Their samples follow each other in the first operand and in the
            results.

    Attributes:
        layout: The places of all parts' tensors, and of one workspace that the parts share.
    """

    def __init__(
        self,
        work: DeviceWork,
        operand_addresses: Sequence[int | None],
        result_addresses: Sequence[int | None],
        *,
        parts_count: int = 1,
    ) -> None:
        self.work = work
        self.operand_addresses, self.result_addresses = operand_addresses, result_addresses
        self.parts_count = parts_count
        divided, *others = work.operands
        operands = [_join_parts(divided, parts_count), *others]
        results = [_join_parts(spec, parts_count) for spec in work.results]
        self.layout = DeviceLayout(
            [*map(layout_spec, operands, operand_addresses)],
            [*map(layout_spec, results, result_addresses)],
            work.workspace_bytes,
        )
        self._graphs: GraphCache[BoundGraph] = GraphCache()
        # Apart from the others: the parts of a call on four blocks have as many graphs as are kept, and would leave no
        # room for graphs of whole calls.
        self._part_graphs: GraphCache[BoundGraph] = GraphCache()

    def may_serve(self) -> bool:
        """Note a call that is about to be served. Return False if a better plan has replaced one of the work's.

        Then the work must be made anew.
        """
        for stand_in in self.work.stand_ins:
            if stand_in.is_replaced:
                return False
            stand_in.note_call()
        return True

    def enqueue(self, base: int, stream: int) -> None:
        """Enqueue all work between upload and download on a stream.

        Tensors on the card that are not aligned as plans need it, such as views of some samples, are copied to the
        block and back.

        Args:
            base: Address of a block for the layout.
        """
        layout, work = self.layout, self.work
        operands = tensor_addresses(base, layout.operands, self.operand_addresses)
        results = tensor_addresses(base, layout.results, self.result_addresses)
        for used, own, spec in zip(operands, self.operand_addresses, work.operands, strict=True):
            if own is not None and own != used:
                copy(used, own, spec.nbytes, stream)
        work.enqueue(operands, results, base + layout.workspace.offset, stream)
        for used, own, spec in zip(results, self.result_addresses, work.results, strict=True):
            if own is not None and own != used:
                copy(own, used, spec.nbytes, stream)

    def launch(
        self,
        stream: Stream,
        work: Callable[[], None],
        bound_to: Hashable = None,
        addresses: HostAddresses = _NO_ADDRESSES,
    ) -> None:
        """Enqueue work on a stream: as a graph, once that pays. See `GraphCache`.

        Args:
            work: Enqueues the work: the same each time for the same `bound_to`.
            bound_to: The addresses on the card that the work is bound to, if they change from call to call.
            addresses: Of the host's arrays that it copies from and to, if they change from call to call. They must
                not overlap.
        """
        _launch(self._graphs, stream, work, bound_to, addresses)

    def launch_part(self, stream: Stream, work: Callable[[], None], bound_to: Hashable) -> None:
        """Enqueue the work of one part, as `launch` does that of a call."""
        _launch(self._part_graphs, stream, work, bound_to, _NO_ADDRESSES)


def _launch(
    graphs: GraphCache[BoundGraph],
    stream: Stream,
    work: Callable[[], None],
    bound_to: Hashable,
    addresses: HostAddresses,
) -> None:
    graphs.run(
        bound_to,
        work,
        capture=lambda: _capture(stream, work, addresses),
        replay=lambda graph: _try_replay(graph, stream, addresses),
    )


def _capture(
    stream: Stream, work: Callable[[], None], addresses: HostAddresses
) -> BoundGraph | None:
    try:
        return BoundGraph(stream.capture(work), addresses)
    except (CudaError, CudnnError) as error:
        # Some of cuDNN's engines do things that no graph can hold. The work is the same without one.
        _log.debug("the work cannot be captured as a graph: %s", error)
        return None


def _try_replay(graph: BoundGraph, stream: Stream, addresses: HostAddresses) -> bool:
    try:
        graph.rebind(addresses)
    except CudaError as error:
        _log.debug("the copies of a graph cannot be retargeted, so it is not launched: %s", error)
        return False
    graph.launch(stream.pointer)
    return True


def _join_parts(part: TensorSpec, count: int) -> TensorSpec:
    samples_count, *sample = part.shape
    return TensorSpec((samples_count * count, *sample), part.dtype)


def layout_spec(spec: TensorSpec, address: int | None) -> TensorSpec | None:
    """Return a tensor's spec if it needs a region of the block; None if plans can use it where it is on the card."""
    is_usable = address is not None and address % OPERAND_ALIGNMENT_BYTES == 0
    return None if is_usable else spec


def tensor_addresses(
    base: int, regions: Sequence[BlockRegion | None], addresses: Sequence[int | None]
) -> list[int]:
    """Return the addresses that the work uses: regions of the block, or else the tensors' own."""
    return [
        base + region.offset if region is not None else address or 0
        for region, address in zip(regions, addresses, strict=True)
    ]

"""Calls of one kind: where their tensors lie on the card, and the graph that they are captured as."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence

from deconvd.model.problem import TensorSpec
from deconvd_server.device.cuda.api.host_memory import HostPlaces
from deconvd_server.device.cuda.api.memory import Region
from deconvd_server.device.cuda.api.runtime import CudaError, Stream, copy
from deconvd_server.device.cuda.cudnn import CudnnError
from deconvd_server.device.cuda.execution.device_layout import Frame
from deconvd_server.device.cuda.execution.graph_cache import Graphs
from deconvd_server.device.cuda.execution.job import Job
from deconvd_server.device.cuda.execution.movable_graph import BoundGraph
from deconvd_server.device.cuda.plan import OPERAND_ALIGNMENT_BYTES

__all__ = ["Kind", "addresses", "spec_to_place"]

_log = logging.getLogger(__name__)

_NOWHERE = HostPlaces(0, (), ())


class Kind:
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
        job: Job,
        operands_at: Sequence[int | None],
        results_at: Sequence[int | None],
        *,
        parts_count: int = 1,
    ) -> None:
        self.job = job
        self.operands_at, self.results_at = operands_at, results_at
        self.parts_count = parts_count
        divided, *others = job.operands
        operands = [_of_all_parts(divided, parts_count), *others]
        results = [_of_all_parts(spec, parts_count) for spec in job.results]
        self.frame = Frame(
            [*map(spec_to_place, operands, operands_at)],
            [*map(spec_to_place, results, results_at)],
            job.workspace_bytes,
        )
        self._graphs: Graphs[BoundGraph] = Graphs()

    def enqueue(self, base: int, stream: int) -> None:
        """Enqueue all work between upload and download on a stream.

        Args:
            base: Address of a block for the frame.
        """
        frame, job = self.frame, self.job
        operands = addresses(base, frame.operands, self.operands_at)
        results = addresses(base, frame.results, self.results_at)
        for address, at, spec in zip(operands, self.operands_at, job.operands, strict=True):
            if at is not None and at != address:
                copy(address, at, spec.nbytes, stream)
        job.enqueue(operands, results, base + frame.workspace.offset, stream)
        for address, at, spec in zip(results, self.results_at, job.results, strict=True):
            if at is not None and at != address:
                copy(at, address, spec.nbytes, stream)

    def launch(
        self,
        stream: Stream,
        work: Callable[[], None],
        at: Hashable = None,
        places: HostPlaces = _NOWHERE,
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
            capture=lambda: _captured(stream, work, places),
            replay=lambda graph: _is_replayed(graph, stream, places),
        )


def _captured(stream: Stream, work: Callable[[], None], places: HostPlaces) -> BoundGraph | None:
    try:
        return BoundGraph(stream.capture(work), places)
    except (CudaError, CudnnError) as error:
        _log.debug("done without a graph: %s", error)
        return None  # some of cuDNN's engines do what no graph can hold


def _is_replayed(graph: BoundGraph, stream: Stream, places: HostPlaces) -> bool:
    try:
        graph.move(places)
    except CudaError as error:
        _log.debug("done without a graph: it does not let its copies be moved: %s", error)
        return False
    graph.launch(stream.pointer)
    return True


def _of_all_parts(part: TensorSpec, count: int) -> TensorSpec:
    samples_count, *sample = part.shape
    return TensorSpec((samples_count * count, *sample), part.dtype)


def spec_to_place(spec: TensorSpec, at: int | None) -> TensorSpec | None:
    """Return what needs room in a frame: None for a tensor that plans can use where it lies."""
    return None if at is not None and at % OPERAND_ALIGNMENT_BYTES == 0 else spec


def addresses(base: int, regions: Sequence[Region | None], at: Sequence[int | None]) -> list[int]:
    """Return where tensors are during the call: in their regions of the block, or else where they lie."""
    return [
        base + region.offset if region is not None else lies_at or 0
        for region, lies_at in zip(regions, at, strict=True)
    ]

"""Deconvolutions of tensors that arrive and leave in slices of samples.

A slice is computed while the next one arrives and the last one leaves. gW and gb are sums over the slices, in their
order, in the compute type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from deconvd.model.dtypes import Array, DType
from deconvd.model.operation import Operation
from deconvd.model.problem import TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.messages import messages_for
from deconvd.wire.stream_parts import MAX_UNREQUESTED_BYTES, ElementsPart, PartReader, elements_part
from deconvd_server.call.context import CallContext
from deconvd_server.device import DeviceTensor, Tensor
from deconvd_server.engine.engine import Engine, ResultTarget
from deconvd_server.residents import Residents
from deconvd_server.service.call_tensors import CallTensors
from deconvd_server.service.method import Parts
from deconvd_server.service.parsed_request import (
    SLICES_IN_FLIGHT,
    ParsedRequest,
    SlicedRequest,
    parse_stream_header,
)
from deconvd_server.service.stream_admission import StreamAdmission
from deconvd_server.service.stream_operands import StreamOperands
from deconvd_server.shared_memory import Lender

__all__ = ["StreamingOperations"]

_T = TypeVar("_T")


class StreamingOperations:
    """Serves the operations' RPCs in streams. Its arguments are those of `DeconvolutionService`."""

    def __init__(
        self,
        residents: Residents,
        lender: Lender | None,
        max_message_bytes: int,
        streams: StreamAdmission,
        executor: Executor,
    ) -> None:
        self._residents = residents
        self._lender = lender
        self._max_message_bytes = max_message_bytes
        self._stream_admission = streams
        self._executor = executor

    def serve(self, operation: Operation, reader: PartReader[Any], call: CallContext) -> Parts:
        """Serve an operation's RPC."""
        header = reader.read_header().header
        sliced = parse_stream_header(operation, header)
        response = messages_for(operation).stream_response
        request, parsed = header.request, sliced.parsed
        with CallTensors(request, parsed, self._lender, self._residents, call) as exchange:
            missing = exchange.find_present()
            sliced.check_slice_size(self._max_message_bytes)
            with self._stream_admission.admit(_footprint_bytes(sliced, missing), call):
                engine = exchange.choose_engine()
                if parsed.problem.has_products:
                    engine.check_time(parsed.problem, parsed.results, call)
                kept = exchange.make_residents(parsed.results, engine)
                operands = StreamOperands(exchange, reader, engine, call)
                if missing:
                    yield response(missing=pb.Missing(fields=missing))
                    operands.take_missing(missing)
                operands.prepare()
                yield response(header=exchange.response())
                yield from _SlicePipeline(
                    sliced, engine, operands, kept, self._executor, call
                ).results()
            exchange.commit()


def _footprint_bytes(sliced: SlicedRequest, missing: Mapping[str, TensorSpec]) -> int:
    """Return what a stream holds of host memory."""
    if not missing:
        return sliced.footprint_bytes
    missing_bytes = sum(spec.nbytes for spec in missing.values())
    return sliced.footprint_bytes + missing_bytes + MAX_UNREQUESTED_BYTES


@dataclass(frozen=True, slots=True)
class _SlicePipeline:
    """The slices of one call, computed as they arrive.

    Attributes:
        sliced: What is to be computed.
        operands: From what.
        kept: Where results go that are kept, by the names of their fields.
        executor: Has a thread for each slice in flight.
    """

    sliced: SlicedRequest
    engine: Engine
    operands: StreamOperands
    kept: Mapping[str, DeviceTensor]
    executor: Executor
    call: CallContext

    def results(self) -> Iterator[ElementsPart]:
        """Yield the elements of results, in the stream's order, while those of operands arrive; not of what is kept.

        Raises as `Arrivals`, `Engine.run` and `Call.check` do.
        """
        parsed = self.sliced.parsed
        operation, specs = parsed.operation, parsed.results
        summed = {field: specs[field] for field in operation.reduced_results if field in specs}
        sums = _SliceSums(summed, parsed.problem.compute_type)
        for arrays in _run_pipelined(self._begin_slices(), self.call):
            sums.add(arrays)
            for field in arrays:
                if field in operation.results:
                    yield elements_part(arrays[field])
        for field, total in sums.totals().items():
            if field in self.kept:
                self.engine.write(self.kept[field], total, self.call)
            else:
                yield elements_part(total)

    def _begin_slices(self) -> Iterator[Future[dict[str, Array]]]:
        """Begin each slice once its operands have come."""
        operation, given = self.sliced.parsed.operation, self.sliced.parsed.operands
        constants = {f: self.operands.read_operand(f) for f in operation.constants if f in given}
        sliced = [field for field in operation.batched_operands if field in given]
        for part, parsed in self.sliced.slices():
            self.call.check()  # its client chooses how many there are
            operands = {
                f: self.operands.read_operand_samples(f, parsed.operands[f], part) for f in sliced
            }
            yield self._begin_slice(part, parsed, {**constants, **operands})
        self.operands.expect_end()

    def _begin_slice(
        self, part: slice, parsed: ParsedRequest, operands: Mapping[str, Tensor]
    ) -> Future[dict[str, Array]]:
        """Have a slice computed while the next arrives; at once if there is no next."""
        if self.sliced.slices_count > 1:
            return self.executor.submit(self._run, part, parsed, operands)
        done: Future[dict[str, Array]] = Future()
        done.set_result(self._run(part, parsed, operands))
        return done

    def _run(
        self, part: slice, parsed: ParsedRequest, operands: Mapping[str, Tensor]
    ) -> dict[str, Array]:
        """Compute a slice, and return those results that are not where they are kept."""
        operation, problem = parsed.operation, parsed.problem
        kept = {
            field: tensor.samples(part.start, part.stop)
            for field, tensor in self.kept.items()
            if field in operation.results
        }
        sent = {field: spec for field, spec in parsed.results.items() if field not in kept}
        places: dict[str, ResultTarget] = {**kept, **sent}
        return self.engine.run(operation, problem, operands, places, parsed.options, self.call)


class _SliceSums:
    """The sums over the slices so far, in the compute type, by the names of their fields.

    Args:
        specs: What they will be.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], compute_type: DType) -> None:
        self._specs = specs
        self._compute_type = compute_type
        self._totals: dict[str, Array] = {}

    def add(self, arrays: Mapping[str, Array]) -> None:
        """Add those of one slice, which are nobody else's."""
        for field in self._specs:
            if field in self._totals:
                self._totals[field] += arrays[field]
            else:
                self._totals[field] = arrays[field].astype(self._compute_type, copy=False)

    def totals(self) -> dict[str, Array]:
        """Return the sums of all slices, in their own types; zeros if there was none."""
        if not self._totals:
            return {field: np.zeros(spec.shape, spec.dtype) for field, spec in self._specs.items()}
        return {
            field: total.astype(self._specs[field].dtype, copy=False)
            for field, total in self._totals.items()
        }


def _run_pipelined(begun: Iterator[Future[_T]], call: CallContext) -> Iterator[_T]:
    """Yield the results of work in its order, some of it being done while others are begun.

    If anything fails, what is under way ends by itself, since the call has: its memory is held
    until then.
    """
    # An error holds this frame, which must hold no future that holds the error: no name for one.
    under_way: list[Future[_T]] = []
    try:
        while _begin_next(begun, under_way):
            if len(under_way) == SLICES_IN_FLIGHT:
                yield under_way.pop(0).result()
        while under_way:
            yield under_way.pop(0).result()
    finally:
        if under_way:
            call.cancel()
            wait(under_way)
            under_way.clear()


def _begin_next(begun: Iterator[Future[_T]], under_way: list[Future[_T]]) -> bool:
    """Begin the next piece of work; return False if there is none."""
    future = next(begun, None)
    if future is not None:
        under_way.append(future)
    return future is not None

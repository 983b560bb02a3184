"""Operations on tensors that arrive and leave in slices of samples.

    arrives     | slice 0 | slice 1 | slice 2 |
    is computed           | slice 0 | slice 1 | slice 2 |
    leaves                          | slice 0 | slice 1 | slice 2 |

gW and gb are sums over the slices, in their order, in the compute type: they leave behind the last slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.operation import Operation
from deconvd.wire.messages import messages_for
from deconvd.wire.stream_parts import ElementsPart, PartReader, elements_part, packed_parts
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
    note_telemetry,
    parse_stream_header,
)
from deconvd_server.service.stream_admission import StreamAdmission
from deconvd_server.service.stream_operands import StreamOperands
from deconvd_server.shared_memory import Lender

__all__ = ["StreamingOperations"]


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
        """Serve an operation's streaming RPC."""
        header = reader.read_header().header
        if header.request.HasField("telemetry"):
            note_telemetry(header.request, call)
        sliced = parse_stream_header(operation, header)
        response = messages_for(operation).stream_response
        request, parsed = header.request, sliced.parsed
        with CallTensors(request, parsed, self._lender, self._residents, call) as call_tensors:
            call_tensors.find_present()
            sliced.check_slice_size(self._max_message_bytes)
            with self._stream_admission.admit(sliced.footprint_bytes, call):
                engine = call_tensors.choose_engine()
                if parsed.problem.has_products:
                    engine.check_time(parsed.problem, parsed.results, call)
                residents = call_tensors.make_residents(parsed.results, engine)
                operands = StreamOperands(call_tensors, reader, engine, call)
                operands.prepare()
                yield response(header=call_tensors.response())
                yield from _SlicePipeline(
                    sliced, engine, operands, residents, header.takes_packed, self._executor, call
                ).results()
            call_tensors.commit()


@dataclass(frozen=True, slots=True)
class _SlicePipeline:
    """The slices of one call, computed as they arrive.

    Attributes:
        sliced: The request.
        residents: New residents that results go to instead of the response, by field.
        packs: Whether results with many zeros are sent packed.
        executor: Has a thread for each slice in flight.
    """

    sliced: SlicedRequest
    engine: Engine
    operands: StreamOperands
    residents: Mapping[str, DeviceTensor]
    packs: bool
    executor: Executor
    call: CallContext

    def results(self) -> Iterator[ElementsPart]:
        """Yield the elements of results in the stream's order, while those of operands arrive.

        Raises as `StreamOperands`, `Engine.run` and `CallContext.check` do. Slices that are in flight then end by
        themselves, since the call has ended. This returns only after them, as they use the call's memory.
        """
        parsed, slices_count = self.sliced.parsed, self.sliced.slices_count
        operation, given = parsed.operation, parsed.operands
        constants = {f: self.operands.read(f, given[f]) for f in operation.constants if f in given}
        batched = [field for field in operation.batched_operands if field in given]
        sums = _SliceSums(parsed)
        # No other name may refer to a future: an error refers to this frame, and the frame would to the error.
        in_flight: list[Future[dict[str, Array]]] = []
        lag = SLICES_IN_FLIGHT - 1
        try:
            for number in range(slices_count + lag):
                if number < slices_count:
                    self.call.check()  # the client chooses how many slices there are
                    in_flight.append(self._begin_slice(number, constants, batched))
                elif number == slices_count:
                    self.operands.expect_end()
                if number < lag or not in_flight:
                    continue
                arrays = in_flight.pop(0).result()
                if sums.specs:
                    sums.add(arrays)
                for field in operation.results:
                    if field in arrays:
                        self.call.sent_bytes += arrays[field].nbytes
                        part = elements_part(arrays[field])
                        if self.packs:
                            yield from packed_parts((part,), arrays[field].itemsize)
                        else:
                            yield part
        finally:
            if in_flight:
                self.call.cancel()
                wait(in_flight)
                in_flight.clear()
        for field, total in sums.totals().items():
            if field in self.residents:
                self.engine.write(self.residents[field], total, self.call)
            else:
                self.call.sent_bytes += total.nbytes
                yield elements_part(total)

    def _begin_slice(
        self, number: int, constants: Mapping[str, Tensor], batched: Sequence[str]
    ) -> Future[dict[str, Array]]:
        """Wait for the operands of a slice, and have it computed while the next arrives; at once if it is the only one.

        Args:
            batched: The fields of the operands that come in slices, in the stream's order.
        """
        samples, parsed = self.sliced.slice_request(number)
        operands = dict(constants)
        for field in batched:
            operands[field] = self.operands.read(field, parsed.operands[field], samples)
        if self.sliced.slices_count > 1:
            return self.executor.submit(self._run, samples, parsed, operands)
        done: Future[dict[str, Array]] = Future()
        done.set_result(self._run(samples, parsed, operands))
        return done

    def _run(
        self, samples: slice, parsed: ParsedRequest, operands: Mapping[str, Tensor]
    ) -> dict[str, Array]:
        """Compute a slice; return the results that do not go to residents."""
        targets: dict[str, ResultTarget] = dict(parsed.results)
        for field, resident in self.residents.items():
            if field in parsed.operation.results:
                targets[field] = resident.samples(samples.start, samples.stop)
        return self.engine.run(
            parsed.operation, parsed.problem, operands, targets, parsed.options, self.call
        )


class _SliceSums:
    """The results that are sums over the samples: their totals over the slices so far, in the compute type.

    Attributes:
        specs: What the totals will be, by field.
    """

    def __init__(self, parsed: ParsedRequest) -> None:
        fields = parsed.operation.reduced_results
        self.specs = {f: parsed.results[f] for f in fields if f in parsed.results}
        self._compute_type = parsed.problem.compute_type
        self._totals: dict[str, Array] = {}

    def add(self, arrays: Mapping[str, Array]) -> None:
        """Add the results of a slice. The first slice's arrays become the totals: they must not be used elsewhere."""
        for field in self.specs:
            if field in self._totals:
                self._totals[field] += arrays[field]
            else:
                self._totals[field] = arrays[field].astype(self._compute_type, copy=False)

    def totals(self) -> dict[str, Array]:
        """Return the sums over all slices, in the results' own types; zeros if there was no slice."""
        if not self._totals:
            return {field: np.zeros(spec.shape, spec.dtype) for field, spec in self.specs.items()}
        with np.errstate(over="ignore"):  # a sum too large for its type is infinity, as on a device
            return {
                field: total.astype(self.specs[field].dtype, copy=False)
                for field, total in self._totals.items()
            }

"""Operations whose tensors are striped over several connections: each call is computed once, as a whole.

    arrive      | W | b | x              |
    computed        |      on a card, part by part             |
    leave                   | y, as its parts are downloaded       |

All operands and results are in host memory that the call's device reads and writes fastest. That memory is admitted
before anything arrives. What does not fit is refused, and the client sends it in slices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

from google.protobuf.message import Message

from deconvd.errors import InvalidArgumentError, UnimplementedError
from deconvd.model.dtypes import Array
from deconvd.model.operation import ARGUMENTS, Operation
from deconvd.model.problem import TensorSpec
from deconvd.wire.codec import Envelope
from deconvd_server.call.context import CallContext
from deconvd_server.device import Departing
from deconvd_server.engine.engine import Engine
from deconvd_server.residents import Residents
from deconvd_server.service.call_tensors import CallTensors
from deconvd_server.service.parsed_request import ParsedRequest, note_telemetry, parse_request
from deconvd_server.service.stream_admission import StreamAdmission
from deconvd_server.service.striped_elements import StripedElements
from deconvd_server.shared_memory import Lender

__all__ = ["StripedOperations"]

_HOST_ARRAY_MARGIN: Final = 8
"""`Device.allocate_host_array` may take an eighth more than an array's size."""


class StripedOperations:
    """Serves striped calls of the operations' RPCs. Its arguments are those of `DeconvolutionService`."""

    def __init__(
        self, residents: Residents, lender: Lender | None, streams: StreamAdmission
    ) -> None:
        self._residents = residents
        self._lender = lender
        self._stream_admission = streams

    def serve(
        self,
        operation: Operation,
        request: Envelope[Any],
        elements: StripedElements,
        answer: Callable[[Envelope[Message]], None],
        call: CallContext,
    ) -> None:
        """Serve a striped call of an operation's RPC. It has ended `elements` before it gives the call's memory back.

        Args:
            answer: Sends the response. Called once the results are computed, while they are still leaving.

        Raises:
            LostTensorError: An operand is given by a digest that nothing here has.
            InvalidArgumentError: The request is not valid, or has elements.
            ExhaustedError: The operands and results will never fit in the host memory for streams.
        """
        if request.message.HasField("telemetry"):
            note_telemetry(request.message, call)
        if sys.byteorder != "little":
            raise UnimplementedError("a striped call needs a server with a little-endian processor")
        for field in request.raw:
            argument = ARGUMENTS[field]
            raise InvalidArgumentError(
                f"{argument} must have its elements in the stripes of a striped call, got them in the request",
                argument=argument,
            )
        parsed = parse_request(operation, request.message, request.data)
        if parsed.shared_slices:
            parsed = replace(parsed, shared_slices={})
        with CallTensors(
            request.message, parsed, self._lender, self._residents, call
        ) as call_tensors:
            call_tensors.find_present()
            sent_operands = _sent_operands(parsed)
            tensors_bytes = parsed.sent_bytes + sum(s.nbytes for s in sent_operands.values())
            footprint_bytes = tensors_bytes + tensors_bytes // _HOST_ARRAY_MARGIN
            with self._stream_admission.admit(footprint_bytes, call):
                try:
                    self._run(call_tensors, sent_operands, elements, call)
                    call.received_bytes = tensors_bytes - parsed.sent_bytes
                    call_tensors.commit()
                    answer(Envelope(call_tensors.response(), {}))
                    elements.finish()
                    call.sent_bytes = parsed.sent_bytes
                finally:
                    elements.end()
                    call_tensors.forget_operands()

    def _run(
        self,
        call_tensors: CallTensors,
        sent_operands: Mapping[str, TensorSpec],
        elements: StripedElements,
        call: CallContext,
    ) -> None:
        """Compute the results while operands arrive and results leave."""
        parsed = call_tensors.parsed
        engine = call_tensors.choose_engine()
        if parsed.problem.has_products:
            engine.check_time(parsed.problem, parsed.results, call)
        arrays = _allocate(sent_operands, engine)
        call_tensors.take_arriving(arrays, elements.receive_into([*arrays.values()]))
        new_residents = call_tensors.make_residents(parsed.results, engine)
        results = _allocate(parsed.sent_results, engine)
        elements.send_from([*results.values()])
        departing = {
            field: Departing(array, partial(elements.note_written, index))
            for index, (field, array) in enumerate(results.items())
        }
        engine.run(
            parsed.operation,
            parsed.problem,
            call_tensors.bring_operands(engine),
            {**new_residents, **departing},
            parsed.options,
            call,
        )


def _sent_operands(parsed: ParsedRequest) -> dict[str, TensorSpec]:
    """Return the specs of the operands that arrive, in the order in which they do."""
    return {
        field: parsed.operands[field]
        for field in parsed.operation.write_order
        if field in parsed.operands and field not in parsed.named
    }


def _allocate(specs: Mapping[str, TensorSpec], engine: Engine) -> dict[str, Array]:
    return {field: engine.allocate_host_array(spec) for field, spec in specs.items()}

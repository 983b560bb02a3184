"""Sends and fetches single tensors: through shared memory if possible, else in a stream of chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from deconvd.direct.events import MethodCode
from deconvd.errors import CallCancelledError, StaleRegionError
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.stream_parts import Part, PartReader, PartSource, elements_parts
from deconvd.wire.tensor import check_described, message_from_spec
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.request_id import current_request_id
from deconvd_client.calls.responses import malformed_response
from deconvd_client.calls.tracing import CallSpan, current_call_span, record_if_traced
from deconvd_client.calls.transport import OutcomeUnknownError, StreamAttempt
from deconvd_client.shared_memory import Borrower, SharedCall
from deconvd_client.transports.route import Route
from deconvd_client.transports.stub import Stub

__all__ = ["Transfers"]


class Transfers:
    """Makes the PutTensor and GetTensor calls of a connection. Its methods raise the errors of `Stub`.

    Args:
        route: Leads to the server.
        borrower: Memory that the server may lend.
        empty: Returns new memory for a tensor.
    """

    def __init__(
        self, route: Route, borrower: Borrower, empty: Callable[[TensorSpec], Array]
    ) -> None:
        self._route = route
        self._borrower = borrower
        self._empty = empty

    def put(self, session: bytes, array: Array, deadline: Deadline) -> tuple[pb.Resident, str]:
        """Send a tensor that the server keeps for a session. Return its name and the ledger."""
        spec = spec_of(array)
        with _record("PutTensor", spec, sent_bytes=spec.nbytes) as span:
            header = pb.PutTensorHeader(session=session, telemetry=_telemetry(span))
            resident, ledger = self._route.call(
                lambda stub: self._put(stub, header, array, deadline), deadline
            )
            if span is not None:
                span.finish(ledger)
            return resident, ledger

    def get(
        self, session: bytes, resident: pb.Resident, spec: TensorSpec, deadline: Deadline
    ) -> tuple[Array, str]:
        """Return the elements of a resident, and the ledger."""
        with _record("GetTensor", spec, received_bytes=spec.nbytes) as span:
            request = pb.GetTensorRequest(
                session=session, resident=resident, telemetry=_telemetry(span)
            )
            array, ledger = self._route.call(
                lambda stub: self._get(stub, request, spec, deadline), deadline
            )
            if span is not None:
                span.finish(ledger)
            return array, ledger

    def _put(
        self, stub: Stub, header: pb.PutTensorHeader, array: Array, deadline: Deadline
    ) -> tuple[pb.Resident, str]:
        if (span := current_call_span.get()) is not None:
            span.begin_attempt(stub.target)
        try:
            with SharedCall(self._borrower, deadline) as call:
                shared = call.operand_message(array)
                if shared is not None:
                    call.copy_operands()
                    if span is not None:
                        span.shares_memory = True
                    return self._call_put(stub, header, shared, None, deadline)
        except StaleRegionError:
            pass  # the server no longer lends that memory: send the tensor in chunks instead
        if self._borrower.is_large(array):
            self._borrower.check_fallback()
        if span is not None:
            span.shares_memory = False
        return self._call_put(stub, header, message_from_spec(spec_of(array)), array, deadline)

    def _get(
        self, stub: Stub, request: pb.GetTensorRequest, spec: TensorSpec, deadline: Deadline
    ) -> tuple[Array, str]:
        if (span := current_call_span.get()) is not None:
            span.begin_attempt(stub.target)
        try:
            with SharedCall(self._borrower, deadline) as call:
                result = call.allocate_result(spec) if self._borrower.is_large(spec) else None
                if result is not None:
                    placed = pb.GetTensorRequest()
                    placed.CopyFrom(request)
                    result.shared_slice.write_to(placed.place)
                    _, ledger = self._call_get(stub, placed, None, deadline)
                    if span is not None:
                        span.shares_memory = True
                    return result.array, ledger
        except StaleRegionError:
            pass  # the server no longer lends that memory: fetch the tensor in chunks instead
        except OutcomeUnknownError:
            # The server may still write to that memory. `Route` tries a cancelled call again, in other memory.
            raise CallCancelledError("a direct connection was lost") from None
        if self._borrower.is_large(spec):
            self._borrower.check_fallback()
        array, ledger = self._call_get(stub, request, spec, deadline)
        assert array is not None
        return array, ledger

    def _call_put(
        self,
        stub: Stub,
        header: pb.PutTensorHeader,
        tensor: pb.Tensor,
        array: Array | None,
        deadline: Deadline,
    ) -> tuple[pb.Resident, str]:
        """Call PutTensor. The elements of `array` follow the header, unless it is None.

        Args:
            header: The header without its tensor.
        """
        complete = pb.PutTensorHeader(tensor=tensor)
        complete.MergeFrom(header)

        def begin() -> StreamAttempt[pb.PutTensorResponse]:
            parts = _parts(complete, array)
            return StreamAttempt(
                MethodCode.PutTensor, parts, _read_put_response, pb.PutTensorResponse
            )

        response, ledger = stub.stream(begin, deadline)
        return response.resident, ledger

    def _call_get(
        self, stub: Stub, request: pb.GetTensorRequest, spec: TensorSpec | None, deadline: Deadline
    ) -> tuple[Array | None, str]:
        """Call GetTensor, and return the elements. If `spec` is None, the server writes them to shared memory."""

        def receive(source: PartSource) -> Array | None:
            reader = PartReader(source, pb.GetTensorResponse, self._empty)
            described = reader.read_header().header
            array = None
            if spec is not None:
                check_described("resident", spec, described)
                array = reader.read("resident", spec)
            reader.expect_end()
            return array

        def begin() -> StreamAttempt[Array | None]:
            return StreamAttempt(
                MethodCode.GetTensor, iter([request]), receive, pb.GetTensorResponse
            )

        return stub.stream(begin, deadline, is_placed=spec is None)


def _record(
    method: str, spec: TensorSpec, **sizes_bytes: int
) -> AbstractContextManager[CallSpan | None]:
    attributes: dict[str, Any] = {f"deconvd.{name}": size for name, size in sizes_bytes.items()}
    tensor = {"deconvd.tensor.shape": spec.shape, "deconvd.tensor.dtype": spec.dtype.name}
    return record_if_traced(method, attributes | tensor)


def _telemetry(span: CallSpan | None) -> pb.Telemetry | None:
    """Return what a request says about its call for logs and traces; None if nothing."""
    telemetry = pb.Telemetry(request_id=current_request_id.get())
    if span is not None:
        span.write_context(telemetry)
    return telemetry if telemetry.ByteSize() else None


def _parts(header: pb.PutTensorHeader, array: Array | None) -> Iterator[Part]:
    yield pb.PutTensorRequest(header=header)
    if array is not None:
        yield from elements_parts(array)


def _read_put_response(source: PartSource) -> pb.PutTensorResponse:
    """Return the only message of a response."""
    message = source.next()
    if not isinstance(message, pb.PutTensorResponse) or source.next() is not None:
        raise malformed_response(pb.PutTensorResponse, "it must be one message")
    return message

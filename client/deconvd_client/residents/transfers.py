"""Sends and fetches single tensors: through shared memory if possible, else in a stream of chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from deconvd.direct.events import MethodCode
from deconvd.errors import CallCancelledError, StaleRegionError
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.stream_parts import Part, PartReader, PartSource, elements_parts
from deconvd.wire.tensor import message_from_spec
from deconvd_client.calls.deadline import Deadline
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
        return self._route.call(lambda stub: self._put(stub, session, array, deadline), deadline)

    def get(
        self, session: bytes, resident: pb.Resident, spec: TensorSpec, deadline: Deadline
    ) -> tuple[Array, str]:
        """Return the elements of a resident, and the ledger."""
        request = pb.GetTensorRequest(session=session, resident=resident)
        return self._route.call(lambda stub: self._get(stub, request, spec, deadline), deadline)

    def _put(
        self, stub: Stub, session: bytes, array: Array, deadline: Deadline
    ) -> tuple[pb.Resident, str]:
        try:
            with SharedCall(self._borrower, deadline) as call:
                shared = call.operand_message(array)
                if shared is not None:
                    call.copy_operands()
                    return self._call_put(stub, session, shared, None, deadline)
        except StaleRegionError:
            pass  # the server no longer lends that memory: send the tensor in chunks instead
        if self._borrower.is_large(array):
            self._borrower.check_fallback()
        return self._call_put(stub, session, message_from_spec(spec_of(array)), array, deadline)

    def _get(
        self, stub: Stub, request: pb.GetTensorRequest, spec: TensorSpec, deadline: Deadline
    ) -> tuple[Array, str]:
        try:
            with SharedCall(self._borrower, deadline) as call:
                result = call.allocate_result(spec) if self._borrower.is_large(spec) else None
                if result is not None:
                    placed = pb.GetTensorRequest()
                    placed.CopyFrom(request)
                    result.shared_slice.write_to(placed.place)
                    _, ledger = self._call_get(stub, placed, None, deadline)
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
        session: bytes,
        tensor: pb.Tensor,
        array: Array | None,
        deadline: Deadline,
    ) -> tuple[pb.Resident, str]:
        """Call PutTensor. The elements of `array` follow the header, unless it is None."""
        header = pb.PutTensorHeader(session=session, tensor=tensor)

        def begin() -> StreamAttempt[pb.PutTensorResponse]:
            parts = _parts(header, array)
            return StreamAttempt(
                MethodCode.PutTensor, parts, _read_single_message, pb.PutTensorResponse
            )

        response, ledger = stub.stream(begin, deadline)
        return response.resident, ledger

    def _call_get(
        self, stub: Stub, request: pb.GetTensorRequest, spec: TensorSpec | None, deadline: Deadline
    ) -> tuple[Array | None, str]:
        """Call GetTensor, and return the elements. If `spec` is None, the server writes them to shared memory."""

        def receive(source: PartSource) -> Array | None:
            reader = PartReader(source, pb.GetTensorResponse, self._empty)
            reader.read_header()
            array = None if spec is None else reader.read("resident", spec)
            reader.expect_end()
            return array

        def begin() -> StreamAttempt[Array | None]:
            return StreamAttempt(
                MethodCode.GetTensor, iter([request]), receive, pb.GetTensorResponse
            )

        return stub.stream(begin, deadline, is_placed=spec is None)


def _parts(header: pb.PutTensorHeader, array: Array | None) -> Iterator[Part]:
    yield pb.PutTensorRequest(header=header)
    if array is not None:
        yield from elements_parts(array)


def _read_single_message(source: PartSource) -> Any:
    """Return the only message of a response."""
    message = source.next()
    source.next()  # reads the end of the stream
    return message

"""Tensors to the server and back by themselves: through shared memory where that works, else in chunks."""

from __future__ import annotations

from collections.abc import Iterator

from deconvd.errors import StaleRegionError
from deconvd.parts import Part, PartReader, elements_parts
from deconvd.problem import TensorSpec
from deconvd.tensor import Array, message_from_spec, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.deadline import Deadline
from deconvd_client.nearest import Nearest
from deconvd_client.shared_memory import Borrower, SharedCall
from deconvd_client.stub import Stub

__all__ = ["Transfers"]


class Transfers:
    """Puts tensors on the server and gets them from there. Its methods raise as `Stub` does.

    Args:
        nearest: The ways to the server.
        memory: Memory that it may lend.
    """

    def __init__(self, nearest: Nearest, memory: Borrower) -> None:
        self._nearest = nearest
        self._memory = memory

    def put(self, session: bytes, array: Array, deadline: Deadline) -> pb.Resident:
        """Have the server keep a tensor for a session, and return how it is called."""
        return self._nearest.call(lambda stub: self._put(stub, session, array, deadline), deadline)

    def get(
        self, session: bytes, resident: pb.Resident, spec: TensorSpec, deadline: Deadline
    ) -> Array:
        """Return a tensor that the server keeps."""
        request = pb.GetTensorRequest(session=session, resident=resident)
        return self._nearest.call(lambda stub: self._got(stub, request, spec, deadline), deadline)

    def _put(self, stub: Stub, session: bytes, array: Array, deadline: Deadline) -> pb.Resident:
        try:
            with SharedCall(self._memory, deadline) as call:
                shared = call.tensor(array)
                if shared is not None:
                    call.settle()
                    return _sent(stub, session, shared, None, deadline)
        except StaleRegionError:
            pass  # it is sent in chunks
        if self._memory.is_large(array):
            self._memory.allow_other_ways()
        return _sent(stub, session, message_from_spec(spec_of(array)), array, deadline)

    def _got(
        self, stub: Stub, request: pb.GetTensorRequest, spec: TensorSpec, deadline: Deadline
    ) -> Array:
        try:
            with SharedCall(self._memory, deadline) as call:
                result = call.result(spec) if call.is_large(spec) else None
                if result is not None:
                    placed = pb.GetTensorRequest()
                    placed.CopyFrom(request)
                    result.place.write_to(placed.place)
                    _received(stub, placed, None, deadline)
                    return result.array
        except StaleRegionError:
            pass  # it comes in chunks
        if self._memory.is_large(spec):
            self._memory.allow_other_ways()
        array = _received(stub, request, spec, deadline)
        assert array is not None
        return array


def _sent(
    stub: Stub, session: bytes, tensor: pb.Tensor, array: Array | None, deadline: Deadline
) -> pb.Resident:
    header = pb.PutTensorHeader(session=session, tensor=tensor)

    def parts() -> Iterator[Part]:
        yield pb.PutTensorRequest(header=header)
        if array is not None:
            yield from elements_parts(array)

    return stub.put_tensor(parts, deadline).resident


def _received(
    stub: Stub, request: pb.GetTensorRequest, spec: TensorSpec | None, deadline: Deadline
) -> Array | None:
    def receive(reader: PartReader[pb.GetTensorResponse]) -> Array | None:
        reader.header()
        array = None if spec is None else reader.read("resident", spec)
        reader.expect_end()
        return array

    return stub.get_tensor(request, receive, deadline)

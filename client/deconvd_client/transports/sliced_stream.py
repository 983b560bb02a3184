"""Calls in streams: operands are sent slice by slice, and results come back meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, TypeAlias

from deconvd.direct.events import MethodCode
from deconvd.model.dtypes import Array
from deconvd.model.operation import ARGUMENTS
from deconvd.model.problem import TensorSpec
from deconvd.wire.messages import messages_for
from deconvd.wire.slice_sizes import SLICE_BYTES
from deconvd.wire.stream_parts import (
    ElementsPart,
    Part,
    PartReader,
    PartSource,
    elements_parts,
)
from deconvd_client.calls.call_spec import CallSpec, Response
from deconvd_client.calls.transport import StreamAttempt

__all__ = ["begin_stream_attempt"]

_StreamResult: TypeAlias = tuple[Response, dict[str, Array]]
"""The response, and the results, by the names of their fields."""


def begin_stream_attempt(
    call_spec: CallSpec, empty: Callable[[TensorSpec], Array]
) -> StreamAttempt[_StreamResult]:
    """Begin an attempt at a call in a stream.

    Args:
        empty: Returns new memory for a result.
    """
    stream_call = _StreamCall(call_spec, empty)
    method = MethodCode[call_spec.operation.stream_name]
    response_type = messages_for(call_spec.operation).stream_response
    return StreamAttempt(
        method, stream_call.parts(), stream_call.receive, response_type, stream_call.is_full_duplex
    )


class _StreamCall:
    """One attempt at a call in a stream. The parts may be taken in another thread than the response.

    Attributes:
        is_full_duplex: Whether parts of the response may come before the request is whole.
    """

    def __init__(self, call_spec: CallSpec, empty: Callable[[TensorSpec], Array]) -> None:
        problem = call_spec.problem
        sample_bytes = (problem.x.nbytes + problem.y.nbytes) // max(problem.n, 1)
        self._step = max(SLICE_BYTES // max(sample_bytes, 1), 1)  # samples of a slice
        self.is_full_duplex: bool = problem.n > self._step
        self._call_spec = call_spec
        self._empty = empty
        self._messages = messages_for(call_spec.operation)

    def parts(self) -> Iterator[Part]:
        """Return the request's parts."""
        header: Any = self._messages.stream_header(
            request=self._call_spec.request, slice_samples_count=self._step
        )
        opening: Any = self._messages.stream_request
        return chain((opening(header=header),), self._elements())

    def receive(self, source: PartSource) -> _StreamResult:
        """Read the response.

        Raises:
            InvalidArgumentError: Its messages are not those of such a response.
        """
        reader: PartReader[Any] = PartReader(source, self._messages.stream_response, self._empty)
        response = reader.read_header().header
        arrays = {
            field: reader.read(ARGUMENTS[field], spec)
            for field, spec in self._call_spec.results.items()
        }
        reader.expect_end()
        return response, arrays

    def _elements(self) -> Iterator[ElementsPart]:
        operands, operation = self._call_spec.operands, self._call_spec.operation
        for field in operation.constants:
            if field in operands:
                yield from elements_parts(operands[field])
        batched = [operands[field] for field in operation.batched_operands if field in operands]
        samples_count = self._call_spec.problem.n if batched else 0
        for begin in range(0, samples_count, self._step):
            for array in batched:
                yield from elements_parts(array[begin : begin + self._step])

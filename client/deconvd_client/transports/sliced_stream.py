"""Calls in streams: what is sent slice by slice, and what comes back meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, Final, TypeAlias

from deconvd.direct.events import MethodCode
from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array
from deconvd.model.operation import ARGUMENTS
from deconvd.model.problem import Problem, TensorSpec
from deconvd.wire.messages import messages_for
from deconvd.wire.stream_parts import (
    ElementsPart,
    Part,
    PartReader,
    PartSource,
    elements_parts,
    slices,
)
from deconvd_client.calls.call_spec import CallSpec, Response
from deconvd_client.calls.transport import StreamAttempt

__all__ = ["begin_stream_attempt"]

_StreamResult: TypeAlias = tuple[Response, dict[str, Array]]
"""The response, and the results that were returned, by the names of their fields."""

_SLICE_BYTES: Final = 8 << 20
"""Operands and results of a slice: enough to keep a GPU busy, little enough to flow."""

_MAX_UNANSWERED_BYTES: Final = 64 << 20
"""What may be sent before the server has said what it lacks."""

_PIECE_BYTES: Final = 1 << 20
"""What is sent between two looks at whether it has."""


def _slice_samples_count(problem: Problem) -> int:
    """Return how many samples a slice has."""
    sample_bytes = (problem.x.nbytes + problem.y.nbytes) // max(problem.n, 1)
    return max(_SLICE_BYTES // max(sample_bytes, 1), 1)


def begin_stream_attempt(
    asked: CallSpec, empty: Callable[[TensorSpec], Array]
) -> StreamAttempt[_StreamResult]:
    """Begin an attempt at a call in a stream.

    Args:
        empty: Returns new memory for a result.
    """
    exchange = _StreamCall(asked, empty)
    method = MethodCode[asked.operation.stream_name]
    response_type = messages_for(asked.operation).stream_response
    return StreamAttempt(
        method, exchange.parts(), exchange.receive, response_type, exchange.is_full_duplex
    )


class _StreamCall:
    """One attempt at a call in a stream. Another thread may take the parts."""

    def __init__(self, asked: CallSpec, empty: Callable[[TensorSpec], Array]) -> None:
        self._call_spec = asked
        self._empty = empty
        self._messages = messages_for(asked.operation)
        self._step = _slice_samples_count(asked.problem)
        # a queue, since an exception from a signal handler can leave an Event locked
        self._missing: SimpleQueue[Sequence[str]] = SimpleQueue()

    @property
    def is_full_duplex(self) -> bool:
        """Whether parts of the response may come before the request is whole."""
        return bool(self._call_spec.offered) or self._call_spec.problem.n > self._step

    def parts(self) -> Iterator[Part]:
        """Yield the request's parts."""
        header: Any = self._messages.stream_header(
            request=self._call_spec.request, slice_samples_count=self._step
        )
        opening: Any = self._messages.stream_request
        yield opening(header=header)
        yield from self._interleave_missing() if self._call_spec.offered else self._elements()

    def receive(self, source: PartSource) -> _StreamResult:
        """Return what the response's messages say.

        Raises:
            InvalidArgumentError: They are not those of such a response.
        """
        reader: PartReader[Any] = PartReader(source, self._messages.stream_response, self._empty)
        try:
            if self._call_spec.offered:
                self._missing.put(self._check_offered(reader.read_missing_fields()))
            response = reader.read_header().header
            arrays = {
                field: reader.read(ARGUMENTS[field], spec)
                for field, spec in self._call_spec.results.items()
            }
            reader.expect_end()
            return response, arrays
        finally:
            self._missing.put(())  # or `parts` would wait for ever

    def _check_offered(self, fields: Sequence[str]) -> Sequence[str]:
        unknown = set(fields) - self._call_spec.offered.keys()
        if unknown:
            raise InvalidArgumentError(f"the server misses what it was not offered: {unknown}")
        return fields

    def _interleave_missing(self) -> Iterator[ElementsPart]:
        """Yield the elements, and what the server lacks as soon as it has said so."""
        unanswered_bytes = 0
        pieces = (piece for part in self._elements() for piece in part.pieces(_PIECE_BYTES))
        for piece in pieces:
            unanswered_bytes += len(piece.data)
            if not self._missing.empty() or unanswered_bytes > _MAX_UNANSWERED_BYTES:
                yield from self._missing_elements()
                yield piece
                break
            yield piece
        else:
            yield from self._missing_elements()
        yield from pieces

    def _missing_elements(self) -> Iterator[ElementsPart]:
        for field in self._missing.get():
            yield from elements_parts(self._call_spec.offered[field], is_missing=True)

    def _elements(self) -> Iterator[ElementsPart]:
        operands, operation = self._call_spec.operands, self._call_spec.operation
        for field in operation.constants:
            if field in operands:
                yield from elements_parts(operands[field])
        sliced = [operands[field] for field in operation.batched_operands if field in operands]
        for samples in slices(self._call_spec.problem.n, self._step) if sliced else ():
            for array in sliced:
                yield from elements_parts(array[samples])

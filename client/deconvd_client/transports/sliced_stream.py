"""Calls in streams: operands are sent slice by slice, and results come back meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Final, TypeAlias

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
    packed_parts,
)
from deconvd.wire.tensor import check_described
from deconvd_client.calls.call_spec import CallSpec, Response
from deconvd_client.calls.transfer import CountedSource
from deconvd_client.calls.transport import StreamAttempt
from deconvd_client.transports.link_rate import LinkRate, MeteredSource

__all__ = ["begin_stream_attempt", "pays_as_stream"]

_StreamResult: TypeAlias = tuple[Response, dict[str, Array]]
"""The response, and the results, by the names of their fields."""

_MIN_SLICES_COUNT: Final = 4
"""How many slices a call must have on a slow link to be a stream rather than a message."""

_MIN_MEASURED_BYTES: Final = 3 << 19
"""How large results must be for a gRPC stream to measure the link: more than its first message must come."""


def begin_stream_attempt(
    call_spec: CallSpec,
    empty: Callable[[TensorSpec], Array],
    link_rate: LinkRate,
    *,
    packs: bool = False,
) -> StreamAttempt[_StreamResult]:
    """Begin an attempt at a call in a stream.

    Args:
        empty: Returns new memory for a result.
        link_rate: Says how large slices are, and learns from the response.
        packs: Whether elements with many zeros travel packed, in both directions.
    """
    if call_spec.transfer is not None:
        call_spec.transfer.begin_attempt()
    stream_call = _StreamCall(call_spec, empty, link_rate, packs=packs)
    method = MethodCode[call_spec.operation.stream_name]
    response_type = messages_for(call_spec.operation).stream_response
    return StreamAttempt(
        method,
        stream_call.parts(),
        stream_call.receive,
        response_type,
        stream_call.is_full_duplex,
    )


def pays_as_stream(call_spec: CallSpec, link_rate: LinkRate) -> bool:
    """Return whether a stream is better than gRPC messages for a call that both can carry.

    A message's results begin to travel when its operands have arrived, so it takes both ways in turn. On a slow link
    that costs more than slices do. While the rate is unknown, a stream measures it.
    """
    if link_rate.bytes_per_s is None:
        sizes = (s.nbytes for f, s in call_spec.results.items() if f in call_spec.operation.results)
        return sum(sizes) >= _MIN_MEASURED_BYTES
    return call_spec.problem.n >= _MIN_SLICES_COUNT * _slice_samples_count(call_spec, link_rate)


def _slice_samples_count(call_spec: CallSpec, link_rate: LinkRate) -> int:
    """Return how many samples a slice has. It is the same in each call if results must have the same bits in each.

    gW and gb are sums over the slices, and a device may choose its algorithm by the number of samples.
    """
    problem = call_spec.problem
    total_bytes = problem.x.nbytes + problem.y.nbytes
    is_fixed = call_spec.request.options.cudnn_deterministic
    slice_bytes = SLICE_BYTES if is_fixed else link_rate.slice_bytes(total_bytes)
    return max(slice_bytes * problem.n // max(total_bytes, 1), 1)


class _StreamCall:
    """One attempt at a call in a stream. The parts may be taken in another thread than the response.

    Attributes:
        is_full_duplex: Whether parts of the response may come before the request is whole.
    """

    def __init__(
        self,
        call_spec: CallSpec,
        empty: Callable[[TensorSpec], Array],
        link_rate: LinkRate,
        *,
        packs: bool,
    ) -> None:
        problem = call_spec.problem
        self._step = _slice_samples_count(call_spec, link_rate)
        self.is_full_duplex: bool = problem.n > self._step
        self._call_spec = call_spec
        self._empty = empty
        self._link_rate = link_rate
        self._packs = packs
        self._messages = messages_for(call_spec.operation)

    def parts(self) -> Iterator[Part]:
        """Return the request's parts."""
        header: Any = self._messages.stream_header(
            request=self._call_spec.request,
            slice_samples_count=self._step,
            takes_packed=self._packs,
        )
        opening: Any = self._messages.stream_request(header=header)
        elements, transfer = self._elements(), self._call_spec.transfer
        return chain((opening,), elements if transfer is None else transfer.count_parts(elements))

    def receive(self, source: PartSource) -> _StreamResult:
        """Read the response.

        Raises:
            InvalidArgumentError: Its messages are not those of such a response.
        """
        transfer = self._call_spec.transfer
        metered = self._measure(source)
        counted = metered if transfer is None else CountedSource(metered, transfer)
        reader: PartReader[Any] = PartReader(counted, self._messages.stream_response, self._empty)
        response = reader.read_header().header
        arrays: dict[str, Array] = {}
        for field, spec in self._call_spec.results.items():
            check_described(ARGUMENTS[field], spec, getattr(response, field))
            if transfer is not None:
                reader.empty = transfer.empty(field)
            arrays[field] = reader.read(ARGUMENTS[field], spec)
        reader.expect_end()
        return response, arrays

    def _measure(self, source: PartSource) -> PartSource:
        """Return the response's parts, whose arrival the link's rate learns from."""
        results, n = self._call_spec.results, self._call_spec.problem.n
        sliced = [results[field] for field in self._call_spec.operation.results if field in results]
        if not sliced or not n:
            return source
        step = min(self._step, n)
        return MeteredSource(source, self._link_rate, sliced[0].nbytes // n * step, n // step)

    def _elements(self) -> Iterator[ElementsPart]:
        operands, operation = self._call_spec.operands, self._call_spec.operation
        for field in operation.constants:
            if field in operands:
                yield from elements_parts(operands[field])
        batched = [operands[field] for field in operation.batched_operands if field in operands]
        samples_count = self._call_spec.problem.n if batched else 0
        for begin in range(0, samples_count, self._step):
            for array in batched:
                parts = elements_parts(array[begin : begin + self._step])
                yield from packed_parts(parts, array.itemsize) if self._packs else parts

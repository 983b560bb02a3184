"""Requests, parsed and checked. Nothing here reads the elements of a tensor, or allocates memory for them.

Most requests come again and again with other elements. So a parsed request is cached by the bytes of its message
without elements, and must not be changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Final

from google.protobuf.message import Message

from deconvd.errors import ExhaustedError, InvalidArgumentError
from deconvd.model.operation import ARGUMENTS, Operation, spec_of_field
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec, problem_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.messages import geometry_from_message, messages_for, options_from_message
from deconvd.wire.shared_slice import SharedSlice
from deconvd.wire.slice_sizes import MAX_SLICE_BYTES
from deconvd.wire.tensor import message_from_spec, spec_from_message
from deconvd_server.call.context import CallContext

__all__ = [
    "SLICES_IN_FLIGHT",
    "ParsedRequest",
    "SlicedRequest",
    "note_telemetry",
    "parse_request",
    "parse_stream_header",
]

SLICES_IN_FLIGHT: Final = 2
"""How many slices of a stream are computed at once: one, and the next as soon as it has arrived."""

_CACHED_REQUESTS_COUNT: Final = 2048
"""How many parsed requests each cache here has: a few KiB each."""

_LARGEST_CACHED_BYTES: Final = 1024
"""More than an honest request takes without its elements. A longer one is parsed each time, so that no client can fill
the cache with large ones."""

_SMALL_BYTES: Final = 64 << 10
_SMALL_PRODUCTS_COUNT: Final = 1 << 18
"""Up to these limits a call is small: it takes its thread longer than it takes the device."""

_NO_PLACE: Final = SharedSlice(b"", 0)

_TELEMETRY: Final = "telemetry"
"""The field of requests that differs from call to call. Requests are cached without it, or none would be found."""

_FRAMING_BYTES: Final = 1024
"""More than the fields of a response take without its tensors' elements."""

_CHECKS: Final = {"b": Problem.check_b, "gy": Problem.check_gy}
"""The checks of operands that a `Problem` does not contain, by field."""


@dataclass(frozen=True, kw_only=True)
class ParsedRequest:
    """A parsed request.

    Operands and results go by the names of their fields, in the order in which they stream.

    Attributes:
        operation: The operation to compute.
        problem: The specs of its tensors, and the geometry.
        wanted: The results that the client wants.
        optional: The optional operands that the request has.
        keep: The operands and results that become residents. Operands that are resident already are not among them.
        shared_slices: The places in shared memory of the operands and results that have one there.
        named: The operands that are named by a handle or a digest.
        remember: The operands that are sent, and remembered by their content.
        has_wide_sums: Whether results that are sums over the samples have the compute type.
        waits: Whether the caller would rather wait than be refused.
    """

    operation: Operation
    problem: Problem
    options: Options
    wanted: tuple[str, ...]
    optional: tuple[str, ...] = ()
    keep: frozenset[str] = frozenset()
    shared_slices: Mapping[str, SharedSlice] = field(default_factory=dict)
    named: frozenset[str] = frozenset()
    remember: frozenset[str] = frozenset()
    has_wide_sums: bool = False
    waits: bool = False

    @cached_property
    def needs_session(self) -> bool:
        """Whether it uses residents of a session, or makes new ones."""
        return bool(self.named or self.keep or self.remember)

    @cached_property
    def is_small(self) -> bool:
        """Whether its work takes well below a millisecond, on a processor, too, and waits for no residents."""
        specs = (*self.operands.values(), *self.results.values())
        x, W = self.problem.x.shape, self.problem.W.shape
        return (
            not self.needs_session
            and sum(spec.nbytes for spec in specs) <= _SMALL_BYTES
            and math.prod(x) * math.prod(W[1:]) <= _SMALL_PRODUCTS_COUNT
        )

    @cached_property
    def operands(self) -> dict[str, TensorSpec]:
        """The specs of its operands."""
        names = self.operation.operands_for(self.wanted, self.optional)
        return {name: spec_of_field(self.problem, name) for name in names}

    @cached_property
    def results(self) -> dict[str, TensorSpec]:
        """The specs of its results."""
        specs = {name: spec_of_field(self.problem, name) for name in self.wanted}
        if self.has_wide_sums:
            for name in specs.keys() & set(self.operation.reduced_results):
                specs[name] = TensorSpec(specs[name].shape, self.problem.compute_type)
        return specs

    @cached_property
    def sent_results(self) -> dict[str, TensorSpec]:
        """The specs of the results whose elements are sent in the response."""
        return {
            name: spec
            for name, spec in self.results.items()
            if name not in self.shared_slices and name not in self.keep
        }

    @cached_property
    def sent_bytes(self) -> int:
        """The size of those elements."""
        return sum(spec.nbytes for spec in self.sent_results.values())

    @cached_property
    def shared_operands_bytes(self) -> int:
        """The size of the operands that are in shared memory."""
        operands = self.operands
        return sum(operands[name].nbytes for name in self.shared_slices if name in operands)

    @cached_property
    def leaving_bytes(self) -> int:
        """The size of the results that the client gets: in the response, or in shared memory."""
        return sum(spec.nbytes for name, spec in self.results.items() if name not in self.keep)

    @cached_property
    def sliced_bytes(self) -> int:
        """The size of its operands and results that have samples."""
        tensors = {**self.operands, **self.results}
        names = self.operation.batched_operands + self.operation.results
        return sum(tensors[name].nbytes for name in names if name in tensors)

    def check_response_size(self, max_message_bytes: int, sendable_bytes: int) -> None:
        """Raise ExhaustedError if the response would be larger than a message may be.

        Args:
            sendable_bytes: The most that its transport sends.
        """
        if self.sent_bytes > sendable_bytes:
            raise ExhaustedError(
                f"the response would have {self.sent_bytes} bytes of elements, too many for a message of a "
                "direct call: the call must be made by gRPC"
            )
        if self.sent_bytes + _FRAMING_BYTES > max_message_bytes:
            raise ExhaustedError(
                f"the result would have {self.sent_bytes} bytes, and the server sends messages of at "
                f"most {max_message_bytes}: send fewer samples at a time, or start it with a larger "
                "--max-message-bytes"
            )

    @cached_property
    def descriptions(self) -> dict[str, pb.Tensor]:
        """The messages that describe its results, without elements. Do not change them."""
        described = {name: message_from_spec(spec) for name, spec in self.results.items()}
        for name, message in described.items():
            if name in self.shared_slices:
                self.shared_slices[name].write_to(message.shared)
        return described

    @cached_property
    def response(self) -> Message:
        """The response without elements, if nothing is kept. Do not change it."""
        return messages_for(self.operation).response(**self.descriptions)


@dataclass(frozen=True)
class SlicedRequest:
    """The parsed header of a stream: a request whose samples come slice by slice.

    Attributes:
        parsed: The request for all samples, with no place in shared memory: a stream sends its results.
        slice_samples_count: The samples in a slice, at least 1. The last slice may have fewer.

    Raises:
        InvalidArgumentError: `slice_samples_count` is less than 1.
    """

    parsed: ParsedRequest
    slice_samples_count: int

    def __post_init__(self) -> None:
        if self.slice_samples_count < 1:
            raise InvalidArgumentError(
                f"slice_samples_count must be at least 1, got {self.slice_samples_count}",
                argument="slice_samples_count",
            )

    @cached_property
    def slices_count(self) -> int:
        """How many slices there are."""
        return -(-self.parsed.problem.n // self._step)

    def slice_request(self, number: int) -> tuple[slice, ParsedRequest]:
        """Return the samples of a slice, and the request for these samples.

        Args:
            number: The number of the slice, from 0.
        """
        n, start = self.parsed.problem.n, number * self._step
        stop = min(start + self._step, n)
        return slice(start, stop), self._full_slice if stop < n else self._last_slice

    @cached_property
    def _step(self) -> int:
        """The samples in a slice: all of them if they have no elements, or a short header could ask for 2^31 slices."""
        parsed = self.parsed
        names = (*parsed.operation.batched_operands, *parsed.operation.results)
        specs = {**parsed.operands, **parsed.results}
        if any(specs[name].nbytes for name in names if name in specs):
            return self.slice_samples_count
        return max(parsed.problem.n, 1)

    @cached_property
    def _full_slice(self) -> ParsedRequest:
        """The request for the largest slice."""
        return self._with_samples_count(min(self._step, self.parsed.problem.n))

    @cached_property
    def _last_slice(self) -> ParsedRequest:
        return self._with_samples_count((self.parsed.problem.n - 1) % self._step + 1)

    def _with_samples_count(self, count: int) -> ParsedRequest:
        whole = self.parsed.problem
        x = TensorSpec((count, *whole.x.shape[1:]), whole.x.dtype)
        return replace(self.parsed, problem=problem_of(x, whole.W, whole.geometry))

    @cached_property
    def footprint_bytes(self) -> int:
        """The host memory that the stream takes: tensors that come whole, sums, and slices in flight."""
        parsed, first = self.parsed, self._full_slice
        whole = [*parsed.operands.items(), *parsed.results.items()]
        whole_bytes = sum(self._whole_bytes(name, spec) for name, spec in whole)
        return whole_bytes + min(self.slices_count, SLICES_IN_FLIGHT + 1) * first.sliced_bytes

    def _whole_bytes(self, name: str, spec: TensorSpec) -> int:
        """Return the host memory that the stream takes for a tensor if that has no samples, else 0."""
        parsed = self.parsed
        if name in parsed.operation.constants:
            return spec.nbytes
        if name not in parsed.operation.reduced_results:
            return 0
        # the sum so far in the compute type, the sums of slices in flight, and the total in the result's type
        wide_bytes = spec.nbytes // spec.dtype.itemsize * parsed.problem.compute_type.itemsize
        return wide_bytes + (SLICES_IN_FLIGHT + 1) * spec.nbytes

    def check_slice_size(self, max_message_bytes: int) -> None:
        """Raise ExhaustedError if a slice of several samples is larger than the schema allows."""
        limit_bytes = max(max_message_bytes, MAX_SLICE_BYTES)
        slice_bytes = self._full_slice.sliced_bytes
        if self.slice_samples_count > 1 and slice_bytes > limit_bytes:
            raise ExhaustedError(
                f"a slice of {self.slice_samples_count} samples has {slice_bytes} bytes, and the "
                f"server takes {limit_bytes}: send fewer samples at a time"
            )


def note_telemetry(message: Any, call: CallContext) -> None:
    """Note what a request says about its call for logs and traces. To be called before the request can be refused."""
    telemetry = message.telemetry
    call.set_request_id(telemetry.request_id)
    call.set_trace_context(telemetry.traceparent, telemetry.tracestate)


def parse_request(
    operation: Operation, message: Message, data: bytes | None = None
) -> ParsedRequest:
    """Parse the request of an operation.

    Args:
        data: The bytes of the message, if they are known: they need not be made again to look the request up.

    Raises:
        InvalidArgumentError: The request is not valid.
    """
    if message.HasField(_TELEMETRY):
        data = _bytes_of_work(message)
    elif data is None:
        data = message.SerializeToString()
    if len(data) > _LARGEST_CACHED_BYTES:
        return _parse(operation, message)
    return _parse_bytes(operation, data)


def _bytes_of_work(message: Message) -> bytes:
    """Return the bytes of a request without what it says about its call alone."""
    if message.HasField(_TELEMETRY):
        original, message = message, type(message)()
        message.CopyFrom(original)
        message.ClearField(_TELEMETRY)
    return message.SerializeToString()


@lru_cache(_CACHED_REQUESTS_COUNT)
def _parse_bytes(operation: Operation, data: bytes) -> ParsedRequest:
    message = messages_for(operation).request.FromString(data)
    places = _take_places(operation, message)
    if not places:
        return _parse(operation, message)
    parsed = _parse_without_places(operation, message.SerializeToString())
    return replace(parsed, shared_slices={name: places[name] for name in parsed.shared_slices})


@lru_cache(_CACHED_REQUESTS_COUNT)
def _parse_without_places(operation: Operation, data: bytes) -> ParsedRequest:
    return _parse(operation, messages_for(operation).request.FromString(data))


def _take_places(operation: Operation, message: Any) -> dict[str, SharedSlice]:
    """Take the places in shared memory out of a request, and return them. It still says which tensors have one.

    A caller who keeps results has each call's in another place. Without the places, those requests are one.
    """
    operands = {name: getattr(message, name) for name in operation.operands}
    fields = {name: tensor.shared for name, tensor in operands.items() if tensor.HasField("shared")}
    for name in operation.all_results:
        if message.HasField(f"{name}_place"):
            fields[name] = getattr(message, f"{name}_place")
    places = {name: SharedSlice.from_message(shared) for name, shared in fields.items()}
    for shared in fields.values():
        _NO_PLACE.write_to(shared)
    return places


def parse_stream_header(operation: Operation, header: Any) -> SlicedRequest:
    """Parse the header of an operation's stream. Raises InvalidArgumentError as `parse_request` does."""
    data = _bytes_of_work(header.request)
    if len(data) > _LARGEST_CACHED_BYTES:
        return _slice_request(_parse(operation, header.request), header.slice_samples_count)
    return _parse_header_bytes(operation, data, header.slice_samples_count)


@lru_cache(_CACHED_REQUESTS_COUNT)
def _parse_header_bytes(operation: Operation, data: bytes, samples_count: int) -> SlicedRequest:
    return _slice_request(_parse_bytes(operation, data), samples_count)


def _slice_request(parsed: ParsedRequest, samples_count: int) -> SlicedRequest:
    return SlicedRequest(replace(parsed, shared_slices={}), samples_count)


def _parse(operation: Operation, message: Any) -> ParsedRequest:
    wanted = _parse_wanted(operation, message)
    problem = problem_of(
        spec_from_message("x", message.x),
        spec_from_message("W", message.w),
        geometry_from_message(message.geometry),
    )
    optional = tuple(name for name in operation.optional if message.HasField(name))
    operands = operation.operands_for(wanted, optional)
    for name in filter(_CHECKS.__contains__, operands):
        _CHECKS[name](problem, spec_from_message(name, getattr(message, name)))
    payloads = {name: getattr(message, name).WhichOneof("payload") for name in operands}
    keep = frozenset(
        name
        for name in (*operands, *wanted)
        if _is_kept(message, name) and payloads.get(name) != "resident"
    )
    _check_places(message, keep)
    return ParsedRequest(
        operation=operation,
        problem=problem,
        options=options_from_message(message.options),
        wanted=wanted,
        optional=optional,
        keep=keep,
        shared_slices=_parse_shared(message, operands, wanted),
        named=frozenset(name for name in operands if payloads[name] in ("resident", "digest")),
        remember=frozenset(
            name
            for name in operation.constants
            if getattr(message.remember, name) and payloads.get(name, "none") in ("raw", None)
        ),
        has_wide_sums=getattr(message, "wide_sums", False),
        waits=message.waits,
    )


def _parse_wanted(operation: Operation, message: Any) -> tuple[str, ...]:
    """Return the results that a request wants: all of them if the operation leaves no choice."""
    results = operation.all_results
    if "wanted" not in message.DESCRIPTOR.fields_by_name:
        return results
    wanted = tuple(name for name in results if getattr(message.wanted, name))
    if not wanted:
        *others, last = (ARGUMENTS[name] for name in results)
        raise InvalidArgumentError(
            f"wanted must name at least one of {', '.join(others)} and {last}, got none",
            argument="wanted",
        )
    return wanted


def _is_kept(message: Any, name: str) -> bool:
    """Return whether an operand or a result becomes a resident."""
    # Some requests have a message `keep` with a flag for each tensor, others one flag `keep_y`.
    return getattr(message.keep, name, False) or getattr(message, f"keep_{name}", False)


def _check_places(message: Any, keep: Iterable[str]) -> None:
    for name in keep:
        place = f"{name}_place"
        if place in message.DESCRIPTOR.fields_by_name and message.HasField(place):
            raise InvalidArgumentError(
                f"{place} must be left out if {name} is kept", argument=place
            )


def _parse_shared(
    message: Any, operands: Iterable[str], results: Iterable[str]
) -> dict[str, SharedSlice]:
    """Return the places in shared memory of operands and results."""
    shared = {}
    for name in operands:
        tensor: pb.Tensor = getattr(message, name)
        if tensor.HasField("shared"):
            shared[name] = SharedSlice.from_message(tensor.shared)
    for name in results:
        if message.HasField(f"{name}_place"):
            shared[name] = SharedSlice.from_message(getattr(message, f"{name}_place"))
    return shared

"""Calls by the nearest way: through shared memory, small ones in one message, large ones in a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from deconvd.codec import Buffer, Envelope
from deconvd.line import MAX_MESSAGE_BYTES
from deconvd.tensor import elements_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.asked import Answered, Asked, RequestT, ResponseT, received
from deconvd_client.late_copy import LateCopy
from deconvd_client.shared_memory import Borrower, call_with_shared_memory
from deconvd_client.streams import Exchange, slice_samples_count
from deconvd_client.stub import Stub

__all__ = ["deconvolve", "differentiate"]

_MAX_UNARY_BYTES: Final = (4 << 20) - (64 << 10)
"""Operands and results together: a stream is faster above it, and proxies have limits of 4 MiB."""

_MAX_BRIEF_BYTES: Final = MAX_MESSAGE_BYTES - (16 << 10)
"""Operands and results together, of a direct call in one message: to copy so little costs less than a stream."""


def deconvolve(
    stub: Stub, memory: Borrower, asked: Asked[pb.DeconvolveRequest]
) -> Answered[pb.DeconvolveResponse]:
    """Call Deconvolve. Raises a DeconvdError, as `Stub` does."""

    def streamed() -> Answered[pb.DeconvolveResponse]:
        step = slice_samples_count(asked.problem)
        header = pb.DeconvolveStreamHeader(request=asked.request, slice_samples_count=step)
        opening = pb.DeconvolveStreamRequest(header=header)
        return stub.deconvolve_stream(lambda: Exchange(asked, opening, step), asked.deadline)

    return _answered(stub, memory, asked, stub.deconvolve, streamed)


def differentiate(
    stub: Stub, memory: Borrower, asked: Asked[pb.DeconvolveGradRequest]
) -> Answered[pb.DeconvolveGradResponse]:
    """Call DeconvolveGrad, in the manner of `deconvolve`."""

    def streamed() -> Answered[pb.DeconvolveGradResponse]:
        step = slice_samples_count(asked.problem)
        header = pb.DeconvolveGradStreamHeader(request=asked.request, slice_samples_count=step)
        opening = pb.DeconvolveGradStreamRequest(header=header)
        return stub.deconvolve_grad_stream(lambda: Exchange(asked, opening, step), asked.deadline)

    return _answered(stub, memory, asked, stub.deconvolve_grad, streamed)


def _answered(
    stub: Stub,
    memory: Borrower,
    asked: Asked[RequestT],
    in_message: Callable[..., Envelope[ResponseT]],
    streamed: Callable[[], Answered[ResponseT]],
) -> Answered[ResponseT]:
    def briefly(request: Envelope[RequestT], late_copy: LateCopy | None) -> Envelope[ResponseT]:
        # what is not in shared memory then is small
        return in_message(request, asked.deadline, is_brief=True, late_copy=late_copy)

    shared = call_with_shared_memory(memory, briefly, asked)
    if shared is not None:
        return shared
    tensors_bytes = _tensors_bytes(asked)
    is_brief = tensors_bytes <= _MAX_BRIEF_BYTES
    max_message_bytes = _MAX_BRIEF_BYTES if stub.is_direct else _MAX_UNARY_BYTES
    if not asked.is_sure or tensors_bytes > max_message_bytes:
        return streamed()
    raw: dict[str, Buffer] = {field: elements_of(a) for field, a in asked.operands.items()}
    response = in_message(Envelope(asked.request, raw), asked.deadline, is_brief=is_brief)
    return Answered(response.message, {field: received(response, field) for field in asked.results})


def _tensors_bytes(asked: Asked[RequestT]) -> int:
    """Return what the tensors have that a call would carry, to and fro."""
    operands_bytes = sum(array.nbytes for array in asked.operands.values())
    return operands_bytes + sum(spec.nbytes for spec in asked.results.values())

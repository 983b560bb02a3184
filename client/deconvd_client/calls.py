"""Calls by the nearest way: through shared memory, small ones in one message, large ones in a stream."""

from __future__ import annotations

from typing import Any, Final

from deconvd.codec import Buffer, Envelope
from deconvd.direct_events import MAX_MESSAGE_BYTES
from deconvd.messages import messages_for
from deconvd.tensor import elements_of
from deconvd_client.asked import Answered, Asked, Request, Response, received
from deconvd_client.late_copy import LateCopy
from deconvd_client.shared_memory import Borrower, call_with_shared_memory
from deconvd_client.streams import Exchange, slice_samples_count
from deconvd_client.stub import Stub

__all__ = ["answer"]

_MAX_UNARY_BYTES: Final = (4 << 20) - (64 << 10)
"""Operands and results together: a stream is faster above it, and proxies have limits of 4 MiB."""

_MAX_BRIEF_BYTES: Final = MAX_MESSAGE_BYTES - (16 << 10)
"""Operands and results together, of a direct call in one message: to copy so little costs less than a stream."""


def answer(stub: Stub, memory: Borrower, asked: Asked) -> Answered:
    """Make a call. Raises a DeconvdError, as `Stub` does."""

    def briefly(request: Envelope[Request], late_copy: LateCopy | None) -> Envelope[Response]:
        # what is not in shared memory then is small
        return stub.call(
            asked.operation, request, asked.deadline, is_brief=True, late_copy=late_copy
        )

    shared = call_with_shared_memory(memory, briefly, asked)
    if shared is not None:
        return shared
    tensors_bytes = _tensors_bytes(asked)
    is_brief = tensors_bytes <= _MAX_BRIEF_BYTES
    max_message_bytes = _MAX_BRIEF_BYTES if stub.is_direct else _MAX_UNARY_BYTES
    if not asked.is_sure or tensors_bytes > max_message_bytes:
        return _streamed(stub, asked)
    raw: dict[str, Buffer] = {field: elements_of(a) for field, a in asked.operands.items()}
    response = stub.call(
        asked.operation, Envelope(asked.request, raw), asked.deadline, is_brief=is_brief
    )
    return Answered(response.message, {field: received(response, field) for field in asked.results})


def _streamed(stub: Stub, asked: Asked) -> Answered:
    step = slice_samples_count(asked.problem)
    messages = messages_for(asked.operation)
    header: Any = messages.stream_header(request=asked.request, slice_samples_count=step)
    opening: Any = messages.stream_request(header=header)
    return stub.stream(asked.operation, lambda: Exchange(asked, opening, step), asked.deadline)


def _tensors_bytes(asked: Asked) -> int:
    """Return what the tensors have that a call would carry, to and fro."""
    operands_bytes = sum(array.nbytes for array in asked.operands.values())
    return operands_bytes + sum(spec.nbytes for spec in asked.results.values())

"""Calls whose large tensors lie in shared memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deconvd.codec import Buffer, Envelope
from deconvd.direct import EARLY_ORDER
from deconvd.errors import StaleRegionError
from deconvd.problem import TensorSpec
from deconvd.tensor import Array, elements_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.asked import Answered, Asked, RequestT, ResponseT, received
from deconvd_client.late_copy import LateCopy
from deconvd_client.shared_memory.borrower import Borrower
from deconvd_client.shared_memory.shared_call import SharedCall, SharedResult

__all__ = ["call_with_shared_memory"]


def call_with_shared_memory(
    borrower: Borrower,
    rpc: Callable[[Envelope[RequestT], LateCopy | None], Envelope[ResponseT]],
    asked: Asked[RequestT],
) -> Answered[ResponseT] | None:
    """Make a call and return its answer.

    None if it is to be made in another way: none of its tensors is large, or there is no room for
    one that is, or the server does not know the memory.

    Args:
        rpc: Makes the call, and with it the copy that it is given, if any.

    Raises:
        UnavailableError, ExhaustedError: There is no other way, as `Borrower.allow_other_ways` says.
    """
    tensors: list[Array | TensorSpec] = [*asked.operands.values(), *asked.results.values()]
    if asked.offered or not any(map(borrower.is_large, tensors)):
        return None
    try:
        answered = _answered(borrower, rpc, asked)
    except StaleRegionError:
        answered = None
    if answered is None:
        borrower.allow_other_ways()
    return answered


def _answered(
    borrower: Borrower,
    rpc: Callable[[Envelope[RequestT], LateCopy | None], Envelope[ResponseT]],
    asked: Asked[RequestT],
) -> Answered[ResponseT] | None:
    request = type(asked.request)()
    request.CopyFrom(asked.request)
    with SharedCall(borrower, asked.deadline) as call:
        places = _want(call, request, asked.results)
        if places is None:
            return None
        raw = _put(call, request, asked.operands)
        if raw is None:
            return None
        call.settle(may_be_late=_may_be_late(request, asked.operands))
        response = rpc(Envelope(request, raw), call.late_copy)
        return Answered(
            response.message,
            {field: _received(response, field, places.get(field)) for field in asked.results},
        )


def _want(
    call: SharedCall, request: RequestT, results: Mapping[str, TensorSpec]
) -> dict[str, SharedResult] | None:
    """Ask for the large results in shared memory; return where they will be."""
    places: dict[str, SharedResult] = {}
    for field, spec in results.items():
        if not call.is_large(spec):
            continue
        result = call.result(spec)
        if result is None:
            return None
        result.place.write_to(getattr(request, f"{field}_place"))
        places[field] = result
    return places


def _put(
    call: SharedCall, request: RequestT, operands: Mapping[str, Array]
) -> dict[str, Buffer] | None:
    """Put the large operands into shared memory; return the others' elements."""
    raw: dict[str, Buffer] = {}
    for field in sorted(operands, key=EARLY_ORDER.index):
        array = operands[field]
        if not call.is_large(array):
            raw[field] = elements_of(array)
            continue
        place = call.place(array)
        if place is None:
            return None
        place.write_to(getattr(request, field).shared)
    return raw


def _may_be_late(request: RequestT, operands: Mapping[str, Array]) -> bool:
    """Return whether a card could follow copies of operands: the one that is written last is in shared memory."""
    if isinstance(request, pb.DeconvolveRequest):
        return request.x.HasField("shared")
    last = max(operands, key=EARLY_ORDER.index, default=None)
    return last is not None and getattr(request, last).HasField("shared")


def _received(response: Envelope[ResponseT], field: str, result: SharedResult | None) -> Array:
    message: pb.Tensor = getattr(response.message, field)
    if result is not None and message.WhichOneof("payload") == "shared":
        return result.array
    return received(response, field)

"""Calls whose large tensors lie in shared memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deconvd.codec import Buffer, Envelope
from deconvd.errors import StaleRegionError
from deconvd.operation import Operation
from deconvd.problem import TensorSpec
from deconvd.tensor import Array, elements_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.asked import Answered, Asked, Request, received
from deconvd_client.shared_memory.borrower import Borrower
from deconvd_client.shared_memory.shared_call import SharedCall, SharedResult

__all__ = ["call_with_shared_memory"]


def call_with_shared_memory(
    borrower: Borrower,
    rpc: Callable[..., tuple[Envelope[Any], str]],
    asked: Asked,
) -> Answered | None:
    """Make a call and return its answer.

    None if it is to be made in another way: none of its tensors is large, or there is no room for
    one that is, or the server does not know the memory.

    Args:
        rpc: Makes the call, as `Stub.call` does.

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
    rpc: Callable[..., tuple[Envelope[Any], str]],
    asked: Asked,
) -> Answered | None:
    request: Any = type(asked.request)()
    request.CopyFrom(asked.request)
    with SharedCall(borrower, asked.deadline) as call:
        places = _want(call, request, asked.results)
        if places is None:
            return None
        raw = _put(call, request, asked.operation, asked.operands)
        if raw is None:
            return None
        call.settle(may_be_late=_may_be_late(request, asked))
        # what is not in shared memory is small
        response, ledger = rpc(
            asked.operation,
            Envelope(request, raw),
            asked.deadline,
            late_copy=call.late_copy,
            is_brief=True,
        )
        return Answered(
            response.message,
            {field: _received(response, field, places.get(field)) for field in asked.results},
            ledger,
        )


def _want(
    call: SharedCall, request: Request, results: Mapping[str, TensorSpec]
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
    call: SharedCall, request: Request, operation: Operation, operands: Mapping[str, Array]
) -> dict[str, Buffer] | None:
    """Put the large operands into shared memory; return the others' elements."""
    raw: dict[str, Buffer] = {}
    for field in operation.write_order:
        array = operands.get(field)
        if array is None:
            continue
        if not call.is_large(array):
            raw[field] = elements_of(array)
            continue
        place = call.place(array)
        if place is None:
            return None
        place.write_to(getattr(request, field).shared)
    return raw


def _may_be_late(request: Request, asked: Asked) -> bool:
    """Return whether a card could follow copies of operands: one with samples is the last that is written."""
    written = [field for field in asked.operation.write_order if field in asked.operands]
    last = written[-1] if written else ""
    return last in asked.operation.sliced and getattr(request, last).HasField("shared")


def _received(response: Envelope[Any], field: str, result: SharedResult | None) -> Array:
    message: pb.Tensor = getattr(response.message, field)
    if result is not None and message.WhichOneof("payload") == "shared":
        return result.array
    return received(response, field)
